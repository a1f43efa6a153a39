"""The points of the search's grid that are predicted to be about as fast as any that fits under some cap.

All kinds of checkpointing, losses and micro-batches beside a chosen plan's other knobs, in both precisions,
compiled and not; and between two kinds of checkpointing, for each cap, as few layers as it takes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import TYPE_CHECKING

from verify_cases import Case, here, plan_of

from sftplan.facts.resolve import resolve_model
from sftplan.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sftplan.facts.hardware import Hardware

KINDS = ("none", "selective", "full")
LOSSES = ("response", "chunked")
PRECISIONS = ("bf16-master", "bf16-mixed")
ROOM = (
    0.985  # of a cap, for layers to be counted by: the chord errs upwards, reserve is more than it
)

Points = dict[Case, tuple[int, float]]  # bytes used and seconds a step, as predicted


def near_the_fastest(
    base: Case, caps_gib: Sequence[float], share: float, hardware: Hardware | None = None
) -> list[Case]:
    """Cases within that share of the fastest that fits under some cap, nearest first."""
    points = _whole(base, hardware or here())
    points |= _mixed(points, base, caps_gib, hardware or here())
    found: dict[Case, float] = {}
    for gib in caps_gib:
        fits = {case: seconds for case, (used, seconds) in points.items() if used <= gib * GIB}
        fastest = min(fits.values(), default=0.0)
        for case, seconds in fits.items():
            if seconds <= fastest * (1 + share):
                found[case] = min(seconds / fastest, found.get(case, math.inf))
    return sorted(found, key=lambda case: found[case])


def _whole(base: Case, hardware: Hardware) -> Points:
    """All layers alike."""
    rows = base.micro_batch * base.accumulation
    micros = [size for size in range(1, rows + 1) if rows % size == 0]
    found: Points = {}
    for kind, loss, micro in product(KINDS, LOSSES, micros):
        for precision, compiled in product(PRECISIONS, (True, False)):
            case = replace(
                base, checkpointing=kind, loss=loss, micro_batch=micro, accumulation=rows // micro,
                precision=precision, compile=compiled,
            )  # fmt: skip
            found[case] = _predicted(case, hardware)
    return found


def _mixed(points: Points, base: Case, caps_gib: Sequence[float], hardware: Hardware) -> Points:
    """Some layers checkpointed, as few as fit under each cap."""
    layers = resolve_model(base.model).num_layers
    found: Points = {}
    for (light, heavy), gib in product(_neighbours(points), caps_gib):
        most, least, limit = points[light][0], points[heavy][0], gib * GIB * ROOM
        if least <= limit < most:
            some = math.ceil(layers * (most - limit) / (most - least))
            case = replace(heavy, checkpointing=f"{heavy.checkpointing}/{some}")
            if some < layers and case not in found:
                found[case] = _predicted(case, hardware)
    return found


def _neighbours(points: Points) -> Iterator[tuple[Case, Case]]:
    """Cases that differ by one step of checkpointing."""
    for light in points:
        for kind, next_kind in pairwise(KINDS):
            if light.checkpointing == kind:
                yield light, replace(light, checkpointing=next_kind)


def _predicted(case: Case, hardware: Hardware) -> tuple[int, float]:
    plan = plan_of(case, hardware)
    return plan.memory.gpu.used_bytes, plan.time.step_s or math.inf
