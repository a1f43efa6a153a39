"""Rows per step and how they are split: micro-batch × accumulation × GPUs is never changed."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from sftplan.cost.rows import examples_per_step
from sftplan.errors import UsageError
from sftplan.facts.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.facts.workload import Workload

LARGEST_MICRO_BATCH = 4096  # rows that no GPU gains from exceeding
# Micro-batches closer than this cost the same; of 60, 64 and 72 rows one is looked at.
MICRO_BATCH_RATIO = 1.2
# Packed rows may hold this much more or fewer examples than asked for, to split well.
PACKED_TOLERANCE = 0.05


def examples_per_row(workload: Workload, *, packing: bool) -> float:
    """Examples in a row: one, or with data and packing their mean number."""
    return examples_per_step(Strategy(packing=packing), workload, 1)


def rows_per_gpu(
    workload: Workload, pins: Mapping[str, object], *, num_gpus: int, packing: bool
) -> int:
    """Rows of one GPU per step, a multiple of what is pinned.

    Packed rows are as many as hold the global batch's examples, unless rows are pinned.
    """
    unit = _pinned_rows(pins)
    whole = {"micro_batch", "accumulation"} <= pins.keys()
    per_row = examples_per_row(workload, packing=packing)
    if per_row > 1 and not workload.global_batch_pinned:
        exact = workload.global_batch / per_row / num_gpus / unit
        return unit if whole else unit * _divisible_near(exact)
    rows, parts = workload.global_batch, unit * num_gpus
    if whole and rows != parts:
        message = f"global batch {rows} is not {unit} pinned rows x {num_gpus} GPUs = {parts}"
        raise UsageError(message, "leave one of them out")
    if rows % parts:
        below, above = rows // parts * parts, math.ceil(rows / parts) * parts
        gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"
        what = gpus if unit == 1 else f"{unit} pinned rows x {gpus}"
        message = f"global batch {rows} cannot be split over {what}"
        hint = f"multiples of {parts} can, such as `--global-batch {below or above}`"
        raise UsageError(message, hint)
    return rows // num_gpus


def _pinned_rows(pins: Mapping[str, object]) -> int:
    values = (pins.get(knob) for knob in ("micro_batch", "accumulation"))
    return math.prod(value for value in values if isinstance(value, int))


def _divisible_near(exact: float) -> int:
    """The whole number near `exact` with most divisors, that is with most ways to split it.

    >>> _divisible_near(22.9), _divisible_near(0.3), _divisible_near(5.2)
    (24, 1, 5)
    """
    low = math.ceil(exact * (1 - PACKED_TOLERANCE))
    high = math.floor(exact * (1 + PACKED_TOLERANCE))
    nearest = max(1, round(exact))
    if high - low > LARGEST_MICRO_BATCH:
        return nearest
    near: set[int] = {nearest, *range(max(1, low), high + 1)}
    return min(near, key=lambda rows: (-len(divisors(rows)), abs(rows - exact)))


@lru_cache(maxsize=1024)
def divisors(rows: int) -> tuple[int, ...]:
    """Divisors that a micro-batch can be, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    largest = min(rows, LARGEST_MICRO_BATCH)
    return tuple(size for size in range(1, largest + 1) if rows % size == 0)


def micro_batches(rows: int, pins: Mapping[str, object]) -> tuple[int, ...]:
    """The micro-batches to look at, ascending, ends included.

    >>> micro_batches(12, {}), micro_batches(12, {"accumulation": 2})
    ((1, 2, 3, 4, 6, 12), (6,))
    """
    micro, accumulation = pins.get("micro_batch"), pins.get("accumulation")
    if isinstance(micro, int):
        return (micro,)
    if isinstance(accumulation, int):
        return (rows // accumulation,)
    kept: list[int] = []
    largest = divisors(rows)[-1]
    for size in divisors(rows):
        apart = not kept or size >= kept[-1] * MICRO_BATCH_RATIO
        if apart and (size == largest or size * MICRO_BATCH_RATIO <= largest):
            kept.append(size)
    return tuple(kept) if kept[-1] == largest else (*kept, largest)
