"""`verify`: a dry run of a plan, judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.errors import NotReadyError
from sftplan.verify.judge import judge

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
) -> Verification:
    """Measure the plan's own step on its GPUs, or trace it without one, and judge the prediction.

    Raises:
        NotReadyError: There is no GPU and no_gpu was not asked for.
        DriftError: The plan was made for another machine.
    """
    if no_gpu:
        message = "this version cannot trace without a GPU yet"
        raise NotReadyError(message, "`sftplan verify PLAN` on a machine with the GPU")
    from sftplan.verify.profile import measure

    return judge(
        plan,
        measure(
            plan, steps=steps, rehearse=rehearse, snapshot=snapshot, data=data, tokenizer=tokenizer,
            skip_bad=skip_bad,
        ),
    )  # fmt: skip
