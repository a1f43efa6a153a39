"""Memory over one step: live bytes by category after every event, from a tape's events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from sftplan.step.tape import ASIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_POINTS = 600  # of a curve: more than a picture has columns


class Events(Protocol):
    """Storage numbers at their births, complements at their deaths; a tape's, or traced ones."""

    @property
    def events(self) -> Sequence[int]:
        """In their order."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each storage."""

    @property
    def kinds(self) -> Sequence[str]:
        """What each is for."""

    @property
    def marks(self) -> Sequence[tuple[int, str]]:
        """At which event a phase begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """`points` hold one number of bytes per category; `phases` say at which point one begins."""

    categories: tuple[str, ...]
    points: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[int, str], ...]

    @property
    def peak(self) -> int:
        """Number of the highest point."""
        totals = [sum(point) for point in self.points]
        return totals.index(max(totals))

    def thinned(self, most: int = MAX_POINTS) -> Timeline:
        """At most about `most` points: of each stretch the highest one.

        >>> long = Timeline(categories=("x",), points=tuple((n % 3,) for n in range(9)), phases=((3, "b"),))
        >>> long.thinned(3)
        Timeline(categories=('x',), points=((2,), (2,), (2,)), phases=((1, 'b'),))
        """
        points = self.points
        width = max(1, -(-len(points) // most))
        kept = tuple(max(points[i : i + width], key=sum) for i in range(0, len(points), width))
        phases = tuple((position // width, phase) for position, phase in self.phases)
        return replace(self, points=kept, phases=phases)


def last_step(events: Events) -> Timeline:
    """The last step of a tape, from its first forward pass to its end, as requested: unrounded."""
    start = last_step_start(events)
    stop = next((p for p, label in events.marks if label == "end"), len(events.events))
    kinds = [kind.partition(ASIDE)[0] for kind in events.kinds]
    names = tuple(dict.fromkeys(kinds))
    order = {name: number for number, name in enumerate(names)}
    live = [0] * len(names)
    points: list[tuple[int, ...]] = []
    for position, event in enumerate(events.events[:stop]):
        index = event if event >= 0 else ~event
        live[order[kinds[index]]] += events.sizes[index] if event >= 0 else -events.sizes[index]
        if position >= start:
            points.append(tuple(live))
    phases = tuple(
        (min(position - start, len(points) - 1), label.partition(" ")[0])
        for position, label in events.marks
        if start <= position < stop and label != "end"
    )
    alive = [n for n in range(len(names)) if any(point[n] for point in points)]
    return Timeline(
        categories=tuple(names[n] for n in alive),
        points=tuple(tuple(point[n] for n in alive) for point in points),
        phases=_merged(phases),
    )


def last_step_start(events: Events) -> int:
    """Where the last step begins: after the gradients of the one before it were let go."""
    ends = [position for position, label in events.marks if label == "zero_grad"]
    after = ends[-2] if len(ends) > 1 else 0
    return next(p for p, label in events.marks if p >= after and label == "forward")


def _merged(phases: tuple[tuple[int, str], ...]) -> tuple[tuple[int, str], ...]:
    """Stretches of layers are one phase."""
    kept: list[tuple[int, str]] = []
    for position, name in phases:
        if not kept or kept[-1][1] != name:
            kept.append((position, name))
    return tuple(kept)
