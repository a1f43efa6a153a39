"""Memory of passes that are CUDA graphs: they take it from a pool of their own, from the second step on.

The first step is issued operation by operation. What it leaves free is given back when the second is captured
(torch.cuda.graph), whose products take workspaces anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftplan.cost.timeline import last_step_start
from sftplan.step.repeat import Events, stretches

PASSES = "passes"  # the graphs' pool


@dataclass(frozen=True, slots=True)
class Captured:
    """The events, the pool of each storage, and where the cache is emptied for the capture."""

    events: Events
    pools: list[str]
    emptied_at: int


def as_captured(events: Events) -> Captured:
    """A job's events as they are where its passes are captured; its last step stands for all captured ones."""
    start = last_step_start(events)
    renewed = _workspaces(events, start)
    anew = {old: len(events.sizes) + number for number, old in enumerate(renewed)}
    written = _written(events, start, anew)
    return Captured(written, _pools(written, start + len(anew)), start + len(anew))


def _workspaces(events: Events, start: int) -> list[int]:
    """Those that live when the last step begins."""
    before = events.events[:start]
    ended = {~event for event in before if event < 0}
    born = [event for event in before if event >= 0 and events.kinds[event] == "workspace"]
    return [storage for storage in born if storage not in ended]


def _written(events: Events, start: int, anew: dict[int, int]) -> Events:
    """Workspaces die before the last step and are born again with it."""
    later = [anew.get(e, e) if e >= 0 else ~anew.get(~e, ~e) for e in events.events[start:]]
    deaths = [~storage for storage in anew]
    return Events(
        [*events.events[:start], *deaths, *anew.values(), *later],
        events.sizes + [events.sizes[old] for old in anew],
        events.kinds + [events.kinds[old] for old in anew],
        [_moved(mark, start, len(anew)) for mark in events.marks],
    )


def _moved(mark: tuple[int, str], start: int, added: int) -> tuple[int, str]:
    """Where a mark is then: the step's first phase begins with the births, all others after them."""
    position, label = mark
    return position + (added if position == start else 2 * added if position > start else 0), label


def _pools(events: Events, start: int) -> list[str]:
    """For each storage the pool that it is from."""
    pools = [""] * len(events.sizes)
    for begin, end, label in stretches(events):
        if begin >= start and label.partition(" ")[0] in ("forward", "backward"):
            for event in events.events[begin:end]:
                if event >= 0:
                    pools[event] = PASSES
    return pools
