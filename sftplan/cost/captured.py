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
    """Workspaces die before the last step, and are born again in it where the first step had need of them."""
    births = _births(events, start, anew)
    out = Events(events.events[:start], events.sizes + [events.sizes[old] for old in anew],
                 events.kinds + [events.kinds[old] for old in anew], [])  # fmt: skip
    out.events.extend(~storage for storage in anew)
    moved = {}
    for position in range(start, len(events.events)):
        moved[position] = len(out.events)
        out.events.extend(births.get(position, ()))
        event = events.events[position]
        out.events.append(anew.get(event, event) if event >= 0 else ~anew.get(~event, ~event))
    moved[len(events.events)] = len(out.events)
    out.marks.extend((moved.get(position, position), label) for position, label in events.marks)
    return out


def _births(events: Events, start: int, anew: dict[int, int]) -> dict[int, list[int]]:
    """New storages by the position before which each is born: after as much of the same stretch as the old one."""
    born = {
        event: position for position, event in enumerate(events.events[:start]) if event in anew
    }
    cut = list(stretches(events))
    found: dict[int, list[int]] = {}
    for old, new in anew.items():
        first, label = next((b, name) for b, end, name in cut if b <= born[old] < end)
        earlier = [e for e in events.events[first : born[old]] if e >= 0 and e not in anew]
        again = next((b, end) for b, end, name in cut if b >= start and name == label)
        births = [p for p in range(*again) if events.events[p] >= 0]
        found.setdefault([*births, again[1]][len(earlier)], []).append(new)
    return found


def _pools(events: Events, start: int) -> list[str]:
    """For each storage the pool that it is from."""
    pools = [""] * len(events.sizes)
    for begin, end, label in stretches(events):
        if begin >= start and label.partition(" ")[0] in ("forward", "backward"):
            for event in events.events[begin:end]:
                if event >= 0:
                    pools[event] = PASSES
    return pools
