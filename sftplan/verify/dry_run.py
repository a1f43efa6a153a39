"""`verify`: a dry run of a plan, judged."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sftplan.errors import UsageError
from sftplan.verify.judge import MEMORY_TOLERANCE, TIME_TOLERANCE, judge

if TYPE_CHECKING:
    from sftplan.plan.record import Plan
    from sftplan.verify.record import Verification


def verify(
    plan: Plan,
    *,
    steps: int | None = None,
    no_gpu: bool = False,
    rehearse: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    skip_bad: int = 0,
    snapshot: str | None = None,
    diff: bool = False,
    memory_tolerance: float | None = None,
    time_tolerance: float | None = None,
) -> Verification:
    """Measure the plan's own step on its GPUs, or trace it without one, and judge the prediction.

    Raises:
        UsageError: Options were asked for together that do not go together.
        NotReadyError: There is no GPU and no_gpu was not asked for, or no PyTorch.
        DriftError: The plan was made for another machine.
    """
    judged = partial(
        judge,
        plan,
        memory_tolerance=_tolerance("memory", memory_tolerance, MEMORY_TOLERANCE),
        time_tolerance=_tolerance("time", time_tolerance, TIME_TOLERANCE),
    )
    if no_gpu:
        asked = {"--steps": steps, "--as": rehearse, "--data": data, "--snapshot": snapshot}
        wrong = [name for name, value in asked.items() if value is not None]
        if wrong:
            message = f"{' and '.join(wrong)} cannot be had with --no-gpu: a trace runs nothing"
            raise UsageError(message, f"leave out {' and '.join(wrong)}, or --no-gpu")
        from sftplan.verify.trace.measure import measure_traced

        traced = measure_traced(plan, diff=diff)
        return judged(traced.measurement, differences=traced.differences)
    if diff:
        message = "--diff compares the tape with a trace"
        raise UsageError(message, "`sftplan verify PLAN --no-gpu --diff`")
    from sftplan.verify.profile import measure

    return judged(
        measure(
            plan, steps=steps, rehearse=rehearse, snapshot=snapshot, data=data, tokenizer=tokenizer,
            skip_bad=skip_bad,
        )
    )  # fmt: skip


def _tolerance(what: str, value: float | None, default: float) -> float:
    """A share of what is measured."""
    if value is None:
        return default
    if not 0 <= value < 1:
        message = f"--{what}-tolerance {value:g} has to be at least 0 and below 1"
        raise UsageError(message)
    return value
