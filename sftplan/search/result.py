"""What a search answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sftplan.cost.estimate import Estimate
    from sftplan.facts.strategy import Strategy
    from sftplan.search.coster import Verdict

KnobValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A strategy with its exact estimate; `change` is what tells it from the chosen one.

    `host_needed_bytes` is what the host would have to hold for an offload that the GPU fits, where
    nothing else does and the host has less.
    """

    strategy: Strategy
    estimate: Estimate
    verdict: Verdict
    change: Mapping[str, KnobValue] = field(default_factory=dict)
    reason: str | None = None
    host_needed_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen strategy. What else there was is computed when it is first asked for.

    When nothing fits, the strategy is the one that needs least memory.
    """

    option: Option
    find_neighbours: Callable[[], Sequence[Option]]
    find_remedies: Callable[[], Sequence[Option]]
    find_reasons: Callable[[], Sequence[tuple[str, str]]]

    @property
    def strategy(self) -> Strategy:
        """The chosen strategy."""
        return self.option.strategy

    @property
    def estimate(self) -> Estimate:
        """What it costs."""
        return self.option.estimate

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        return self.option.verdict

    @property
    def host_needed_bytes(self) -> int | None:
        """What the host lacks room for, if that is why nothing fits."""
        return self.option.host_needed_bytes

    @property
    def neighbours(self) -> Sequence[Option]:
        """One decision changed, fastest first, those that do not fit last."""
        return self.find_neighbours()

    @property
    def remedies(self) -> Sequence[Option]:
        """Changes after which it fits."""
        return self.find_remedies()

    @property
    def reasons(self) -> Sequence[tuple[str, str]]:
        """Decisions that were not pinned, and why they were taken so."""
        return self.find_reasons()
