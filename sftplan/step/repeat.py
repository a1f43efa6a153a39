"""Many equal layers from a few: the events of a tape of five layers, written out for any number.

The first two and the last two layers stand as they are; the middle one is repeated. Layers that are checkpointed
and layers that are not are five each. Storages are renamed by the layer that owns them and their place among
those born with them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sftplan.step.tape import Tape

    Times = Mapping[int, int]

FEW_LAYERS = 5
MIDDLE = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the tape: phase, layer (None: of no single one) and how often that pair came before."""

    phase: str
    layer: int | None
    occurrence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Events:
    """Births and deaths with the sizes and kinds of the storages; marks where segments begin."""

    events: list[int]
    sizes: list[int]
    kinds: list[str]
    marks: list[tuple[int, str]]


def segments(tape: Tape) -> list[Segment]:
    """The tape cut at its marks."""
    seen: Counter[str] = Counter()
    out = []
    stops = [position for position, _ in tape.marks[1:]] + [len(tape.events)]
    for (start, label), stop in zip(tape.marks, stops, strict=True):
        phase, _, number = label.rpartition(" ")
        if number.isdigit():
            out.append(Segment(phase, int(number), seen[label], start, stop))
        else:
            out.append(Segment(label, None, seen[label], start, stop))
        seen[label] += 1
    return out


def stretches(events: Events | Tape) -> Iterator[tuple[int, int, str]]:
    """Where each marked stretch begins and ends, and its label."""
    bounds = [position for position, _ in events.marks] + [len(events.events)]
    for (start, label), stop in zip(events.marks, bounds[1:], strict=True):
        yield start, stop, label


def times_of(*stretches: int) -> dict[int, int]:
    """For how many layers each of the few stands that stands for more than one; equal layers by stretch.

    >>> times_of(36), times_of(8, 28), times_of(3)
    ({2: 32}, {2: 4, 7: 24}, {})
    """
    times = {}
    before = 0
    for layers in stretches:
        if layers > FEW_LAYERS:
            times[before + MIDDLE] = layers - FEW_LAYERS + 1
        before += min(layers, FEW_LAYERS)
    return times


def _shift(layer: int | None, times: Times) -> int:
    """By how much the number of a layer grows, by those before it that stand for several."""
    if layer is None:
        return 0
    return sum(many - 1 for middle, many in times.items() if middle < layer)


def sequence(few: list[Segment], times: Times) -> Iterator[tuple[Segment, int]]:
    """The few segments in the order of the many, each with the shift of its layer."""
    for segment in few:
        shift = _shift(segment.layer, times)
        shifts = range(shift, shift + _times(segment.layer, times))
        yield from (
            (segment, s) for s in (reversed(shifts) if segment.phase == "backward" else shifts)
        )


def _times(layer: int | None, times: Times) -> int:
    return 1 if layer is None else times.get(layer, 1)


class _Names:
    """Numbers of the many storages by where the few are born."""

    def __init__(self, tape: Tape, few: list[Segment]) -> None:
        self.places: list[tuple[str, int, int]] = [("", 0, 0)] * len(tape.sizes)
        for segment in few:
            born: Counter[int | None] = Counter()
            phase = segment.phase if segment.layer is None else segment.phase + " of a layer"
            for event in tape.events[segment.start : segment.stop]:
                if event >= 0:
                    owner = tape.owners[event]
                    self.places[event] = (phase, segment.occurrence, born[owner])
                    born[owner] += 1
        self.numbers: dict[tuple[tuple[str, int, int], int | None], int] = {}


def expand(tape: Tape, times: Times) -> Events:
    """The events of all layers from those of a few."""
    few = segments(tape)
    names = _Names(tape, few)
    out = Events([], [], [], [])
    for segment, shift in sequence(few, times):
        layer = None if segment.layer is None else segment.layer + shift
        label = segment.phase if layer is None else f"{segment.phase} {layer}"
        out.marks.append((len(out.events), label))
        stretch = tape.events[segment.start : segment.stop]
        if layer is not None:
            _write(tape, stretch, shift, names, out)
        else:
            _write_for_all(tape, stretch, times, names, out)
    return out


def _write_for_all(
    tape: Tape, stretch: list[int], times: Times, names: _Names, out: Events
) -> None:
    """A stretch of no single layer: what it does to a middle layer it does to all that it stands for."""
    before: int | None = None
    for owner, run in groupby(stretch, key=lambda e: tape.owners[e if e >= 0 else ~e]):
        events = list(run)
        shift = _shift(owner, times)
        shifts = range(shift, shift + _times(owner, times))
        falling = before is not None and owner is not None and before > owner
        for each in reversed(shifts) if falling else shifts:
            _write(tape, events, each, names, out)
        before = owner


def _write(tape: Tape, stretch: list[int], shift: int, names: _Names, out: Events) -> None:
    owners, places, numbers = tape.owners, names.places, names.numbers
    for event in stretch:
        index = event if event >= 0 else ~event
        owner = owners[index]
        key = (places[index], None if owner is None else owner + shift)
        if event >= 0:
            number = numbers[key] = len(out.sizes)
            out.sizes.append(tape.sizes[index])
            out.kinds.append(tape.kinds[index])
            out.events.append(number)
        else:
            out.events.append(~numbers.pop(key))
