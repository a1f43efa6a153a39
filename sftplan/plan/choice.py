"""What the search hands over: the strategy it chose, its estimate, and what else there was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.cost.estimate import Estimate
    from sftplan.facts.strategy import Strategy
    from sftplan.plan.record_costs import KnobValue, Verdict


class Alternative(Protocol):
    """The chosen strategy with something changed, and what it would cost then."""

    @property
    def change(self) -> Mapping[str, KnobValue]:
        """Knobs and their other values."""

    @property
    def estimate(self) -> Estimate:
        """What it would cost."""

    @property
    def verdict(self) -> Verdict:
        """Whether it would fit."""

    @property
    def reason(self) -> str | None:
        """Why it was not chosen, if the figures do not say so."""


class Choice(Protocol):
    """The answer of a search.

    When nothing fits, `strategy` is the one that needs least memory and `estimate` is its.
    """

    @property
    def strategy(self) -> Strategy:
        """The chosen strategy."""

    @property
    def estimate(self) -> Estimate:
        """What it costs."""

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""

    @property
    def host_needed_bytes(self) -> int | None:
        """What an offload that the GPU fits needs of the host, if that is why nothing fits."""

    @property
    def neighbours(self) -> Sequence[Alternative]:
        """One decision changed."""

    @property
    def remedies(self) -> Sequence[Alternative]:
        """Changes after which it fits, each found by a search of its own."""

    @property
    def reasons(self) -> Sequence[tuple[str, str]]:
        """Decisions and why they were taken."""
