"""GPU memory of a step, read off its tape."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from sftplan.cost.allocator import replay
from sftplan.cost.blocks import round_size
from sftplan.cost.captured import as_captured
from sftplan.step.repeat import stretches
from sftplan.step.tape import ASIDE, TUNING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sftplan.step.repeat import Events
    from sftplan.step.tape import Tape

ROUNDING = "rounding"  # what blocks are larger than what was asked for
BUILDING = "building of the model"


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak bytes that one rank allocates and reserves; `by_category` adds up to the first."""

    allocated_bytes: int
    reserved_bytes: int
    at: str
    by_category: Mapping[str, int]


def exact_peaks(
    events: Events, *, expandable: bool, captured: bool = False, steps_alone: bool = False
) -> Peaks:
    """Every event through the allocator; `captured` passes are CUDA graphs.

    `steps_alone` are the peaks from the first forward pass on.
    """
    emptied_at = [begins(events)]
    named = {kind: kind.partition(ASIDE) for kind in set(events.kinds)}
    if captured:
        graphs = as_captured(events)
        events, streams = graphs.events, graphs.pools
        emptied_at.append(graphs.emptied_at)
    else:
        streams = [named[kind][2] for kind in events.kinds]
    passing = passing_weights(events) | _tuning(events)
    result = replay(
        events.events, events.sizes, expandable=expandable, streams=streams,
        emptied_at=emptied_at, passing=passing, counted_from=emptied_at[0] if steps_alone else 0,
    )  # fmt: skip
    kinds: Counter[str] = Counter()
    for event in events.events[: result.peak_event + 1]:
        index = event if event >= 0 else ~event
        size = events.sizes[index] if index not in passing else 0
        kinds[events.kinds[index]] += size if event >= 0 else -size
    categories: Counter[str] = Counter()
    for kind, size in kinds.items():
        categories[named[kind][0]] += size
    by_category = {kind: size for kind, size in categories.items() if size}
    by_category[ROUNDING] = result.peak_allocated_bytes - sum(by_category.values())
    label = max((m for m in events.marks if m[0] <= result.peak_event), key=lambda m: m[0])[1]
    return Peaks(
        allocated_bytes=result.peak_allocated_bytes,
        reserved_bytes=result.peak_reserved_bytes,
        at=describe(label),
        by_category=by_category,
    )


def begins(events: Events | Tape) -> int:
    """The event with which the first forward pass begins."""
    starts = (at for at, label in events.marks if label.startswith("forward"))
    return next(starts, len(events.events))


def passing_weights(events: Events | Tape) -> frozenset[int]:
    """Weights that go while the model is built: where there is no room beside them, the host holds them."""
    return frozenset(
        ~event for event in events.events[: begins(events)]
        if event < 0 and events.kinds[~event] == "weights"
    )  # fmt: skip


def _tuning(events: Events) -> frozenset[int]:
    """What inductor tries kernels beside, in the first step alone."""
    return frozenset(number for number, kind in enumerate(events.kinds) if kind == TUNING)


def describe(label: str) -> str:
    """The name of a segment as a person says it.

    >>> describe("backward 35"), describe("forward end"), describe("backward")
    ('backward pass of layer 35', 'forward pass, LM head and loss', 'backward pass of the loss')
    """
    phase, _, rest = label.partition(" ")
    if rest.isdigit():
        return f"{phase} pass of layer {rest}"
    return {
        "forward end": "forward pass, LM head and loss",
        "forward": "forward pass, embedding",
        "backward": "backward pass of the loss",
        "start": BUILDING,
        "optimizer": "optimizer step",
        "clip": "clipping",
    }.get(label, label)


def allocated_bound_bytes(few: Tape, multiplicity: Mapping[int, int]) -> int:
    """Peak allocated without splitting losses: segments' net sizes, the middle layer's many times.

    Exact where the allocator splits every block, as with expandable segments.
    """
    sizes = [round_size(size) if size else 0 for size in few.sizes]
    for passing in passing_weights(few):
        sizes[passing] = 0
    live = peak = 0
    for start, stop, label in stretches(few):
        number = label.rpartition(" ")[2]
        if number.isdigit():
            runs = iter([(multiplicity.get(int(number), 1), few.events[start:stop])])
        else:
            runs = _by_layer(few, start, stop, multiplicity)
        for times, events in runs:
            highest, net = _excursion(events, sizes)
            last = live + net * (times - 1)
            peak = max(peak, live + highest, last + highest)
            live = last + net
    return peak


def _by_layer(
    few: Tape, start: int, stop: int, multiplicity: Mapping[int, int]
) -> Iterator[tuple[int, list[int]]]:
    """A stretch of no single layer, cut by whose storages it touches: layer after layer does the same."""
    owners = few.owners
    runs = groupby(few.events[start:stop], key=lambda e: owners[e if e >= 0 else ~e])
    for owner, run in runs:
        yield 1 if owner is None else multiplicity.get(owner, 1), list(run)


def _excursion(events: list[int], sizes: list[int]) -> tuple[int, int]:
    """Highest and final level of a stretch, from zero."""
    level = highest = 0
    for event in events:
        if event >= 0:
            level += sizes[event]
            if level > highest:
                highest = level
        else:
            level -= sizes[~event]
    return highest, level
