"""Predicted against measured: within the tolerance or not, which term is off, and what is safe then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sftplan
from sftplan.plan.file import plan_sha256
from sftplan.units import format_gib
from sftplan.verify import measurement as keys
from sftplan.verify.next_plan import next_safe_plan
from sftplan.verify.record import PhaseRow, Row, Verification

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.plan.record import Plan
    from sftplan.verify.measurement import Measurement
    from sftplan.verify.record import Difference

MEMORY_TOLERANCE, TIME_TOLERANCE = 0.02, 0.10
JUDGED_MEMORY = (keys.ALLOCATED, keys.RESERVED, keys.USED)
SHOWN = (keys.ALLOCATED, keys.RESERVED, keys.CONTEXT, keys.USED, keys.HOST, keys.FLOPS, keys.STEP,
         keys.OPTIMIZER, keys.TOKENS, keys.MFU)  # fmt: skip


def judge(
    plan: Plan,
    measured: Measurement,
    *,
    memory_tolerance: float = MEMORY_TOLERANCE,
    time_tolerance: float = TIME_TOLERANCE,
    differences: Sequence[Difference] = (),
) -> Verification:
    """Every quantity that was measured beside its prediction; tolerances are fractions of the measured."""
    tolerances = dict.fromkeys(JUDGED_MEMORY, memory_tolerance)
    if not measured.rehearsal:
        tolerances[keys.STEP] = time_tolerance
    rows = [
        _row(
            key,
            measured.instead.get(key, predicted_of(plan, key)),
            measured.quantities[key],
            tolerances.get(key),
        )
        for key in SHOWN
        if key in measured.quantities
    ]
    missed = [row for row in rows if row.within is False]
    ok = not missed and measured.out_of_memory is None
    beyond = _too_much(plan, measured)
    following = None
    if beyond:
        following = next_safe_plan(plan, beyond)
    return Verification(
        created_by=f"sftplan {sftplan.__version__}",
        plan_sha256=plan_sha256(plan),
        ok=ok,
        mode=measured.mode,
        rows=rows,
        judgement=_sentence(measured, missed, following),
        phases=[PhaseRow(name=p.name, seconds=p.seconds, peak_allocated_bytes=p.peak_allocated_bytes)
                for p in measured.phases],
        notes=list(measured.notes),
        next_plan=following,
        versions=dict(measured.versions),
        timeline=measured.timeline,
        differences=list(differences),
    )  # fmt: skip


def predicted_of(plan: Plan, key: str) -> float | None:
    """A number of the plan by its key, such as `memory.gpu.used_bytes`."""
    value: object = plan
    for name in key.split("."):
        value = getattr(value, name)
    return value if isinstance(value, int | float) else None


def _row(key: str, predicted: float | None, measured: float, tolerance: float | None) -> Row:
    error = predicted / measured - 1 if predicted is not None and measured else None
    within = None if tolerance is None or error is None else abs(error) <= tolerance
    return Row(
        quantity=key, predicted=predicted, measured=measured, error_fraction=error, within=within
    )


def _too_much(plan: Plan, measured: Measurement) -> int:
    """Bytes that the run needs beyond what was planned, 0 where it needs no other plan."""
    gpu = plan.memory.gpu
    if measured.out_of_memory is not None:
        least = measured.out_of_memory.reserved_bytes - gpu.peak_reserved_bytes
        return max(least, gpu.headroom_bytes or 0, 1)
    used = measured.quantities.get(keys.USED, 0)
    return max(0, round(used - gpu.used_bytes)) if used > gpu.capacity_bytes else 0


def _sentence(measured: Measurement, missed: list[Row], following: dict[str, object] | None) -> str:
    """The judgement in words: what is off most, and what is safe."""
    out = measured.out_of_memory
    if out is not None:
        said = (
            f"out of GPU memory in {out.phase} of step {out.step}, "
            f"with {format_gib(out.reserved_bytes)} GiB reserved and {format_gib(out.free_bytes)} GiB free"
        )
    elif missed:
        worst = max(missed, key=lambda row: abs(row.error_fraction or 0.0))
        side = "above" if (worst.error_fraction or 0.0) > 0 else "below"
        error = abs(worst.error_fraction or 0.0)
        said = f"{worst.quantity} was predicted {error:.1%} {side} what was measured"
    else:
        return "the prediction holds"
    if following is None:
        return said
    knobs = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in following.items())
    return f"{said}; the next safe plan: {knobs or 'none fits'}"
