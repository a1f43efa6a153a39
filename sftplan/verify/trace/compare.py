"""Tape against trace, op by op: what one of them has and the other has not, and what lives longer.

Both are sequences of births. The longest runs of equal sizes are matched; what is left over is named
after the operator that made it in the real model. A matched pair whose deaths lie on different sides
of a matched birth lives longer on one of the two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from sftplan.cost.blocks import SMALL_BYTES
from sftplan.cost.timeline import last_step_start
from sftplan.verify.record import Difference

if TYPE_CHECKING:
    from sftplan.cost.timeline import Events
    from sftplan.verify.trace.run import Trace


@dataclass(frozen=True, slots=True)
class _Births:
    """Storages of a step in their order, and between which births each dies."""

    numbers: list[int]
    sizes: list[int]
    deaths: dict[int, int]


def differences(
    trace: Trace, modelled: Events, *, at_least_bytes: int = SMALL_BYTES
) -> list[Difference]:
    """Where the last step of the trace and of the tape differ, largest first.

    Storages below `at_least_bytes` share small segments and are left out.
    """
    real = _births(trace, at_least_bytes)
    tape = _births(modelled, at_least_bytes)
    found: Counter[tuple[str, str, str, int]] = Counter()
    matched: list[tuple[int, int]] = []
    matcher = SequenceMatcher(a=real.sizes, b=tape.sizes, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            matched += zip(range(i, i_end), range(j, j_end), strict=True)
            continue
        for number in real.numbers[i:i_end]:
            found["only traced", *_made(trace, number)] += 1
        phase = _made(trace, real.numbers[min(i, len(real.numbers) - 1)])[0]
        for number in tape.numbers[j:j_end]:
            found["only modelled", phase, modelled.kinds[number], modelled.sizes[number]] += 1
    found.update(_longer_lives(trace, real, tape, matched))
    named = [
        Difference(what=what, phase=phase, maker=maker, each_bytes=size, count=count)  # type: ignore[arg-type]
        for (what, phase, maker, size), count in found.items()
    ]
    return sorted(named, key=lambda difference: -difference.each_bytes * difference.count)


def _longer_lives(
    trace: Trace, real: _Births, tape: _Births, matched: list[tuple[int, int]]
) -> Counter[tuple[str, str, str, int]]:
    """Matched storages that die after a birth on one side and before it on the other."""
    found: Counter[tuple[str, str, str, int]] = Counter()
    places, tape_places = [i for i, _ in matched], [j for _, j in matched]
    for i, j in matched:
        number, other = real.numbers[i], tape.numbers[j]
        traced = bisect_left(places, real.deaths.get(number, len(real.numbers)))
        modelled = bisect_left(tape_places, tape.deaths.get(other, len(tape.numbers)))
        if traced != modelled:
            side = "traced" if traced > modelled else "modelled"
            found[f"lives longer {side}", *_made(trace, number)] += 1
    return found


def _births(source: Events, at_least_bytes: int) -> _Births:
    numbers: list[int] = []
    deaths: dict[int, int] = {}
    for event in source.events[last_step_start(source) :]:
        if event < 0:
            deaths[~event] = len(numbers)
        elif source.sizes[event] >= at_least_bytes:
            numbers.append(event)
    return _Births(numbers, [source.sizes[number] for number in numbers], deaths)


def _made(trace: Trace, number: int) -> tuple[str, str, int]:
    """Phase, operator and bytes of a traced storage."""
    return trace.phases[number], trace.makers[number], trace.sizes[number]
