"""The dry run on GPUs, as the process sees it that asked for it: start, merge, say what disturbed it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan.data.read import found_from_anywhere
from sftplan.detect.gpus import detect
from sftplan.errors import NotReadyError, SftplanError, UsageError
from sftplan.plan.drift import check_drift
from sftplan.verify.calibrate import learn
from sftplan.verify.occupancy import all_taken_bytes, taken_meanwhile
from sftplan.verify.processes import run_processes
from sftplan.verify.read import measurement_of
from sftplan.verify.rehearse import cap_bytes, check_larger
from sftplan.verify.request import Request, write_request

if TYPE_CHECKING:
    from sftplan.plan.record import Plan
    from sftplan.verify.measurement import Measurement

MIN_STEPS, MAX_STEPS = 4, 12
TIMED_S = 20.0  # of steps, where nobody says how many; long steps vary little
MORE_ROUNDS_S = 20.0  # of them, where the host makes steps uneven: it does so over seconds
START_S = 600.0  # imports, building, compiling: beyond it something hangs
PATIENCE = 20.0  # times the predicted seconds


def measure(
    plan: Plan,
    *,
    steps: int | None = None,
    rehearse: str | None = None,
    snapshot: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    skip_bad: int = 0,
    cpu: bool = False,
) -> Measurement:
    """Run a plan's own step on its GPUs and measure it; what was found refines the calibration.

    Args:
        plan: What is to be proved.
        steps: How many steps are timed.
        rehearse: The profile of a smaller card, which this one plays.
        snapshot: Where PyTorch's memory snapshot is kept.
        data: Instruction data, for its longest rows and its typical ones.
        tokenizer: A folder with a tokenizer, instead of the model's.
        skip_bad: How many bad examples may be left out.
        cpu: Time it on the processor, with as many processes, which proves nothing of the plan.

    Raises:
        SftplanError: There is no such GPU, the data cannot be used, or a process died.
    """
    found = measure_here(
        plan, steps=steps, rehearse=rehearse, snapshot=snapshot, data=data, tokenizer=tokenizer,
        skip_bad=skip_bad, cpu=cpu,
    )  # fmt: skip
    notes = []
    if not cpu and rehearse is None:
        try:
            learn(plan, found)
        except SftplanError as error:  # no reason to lose what was measured
            notes.append(f"no calibration was kept: {error.message}")
    return measurement_of(plan, found, rehearse=rehearse, notes=notes)


def default_steps(plan: Plan) -> int:
    """How many steps are timed where nobody says it."""
    seconds = plan.time.step_s or 1.0
    return max(MIN_STEPS, min(MAX_STEPS, round(TIMED_S / seconds)))


def measure_here(
    plan: Plan,
    *,
    steps: int | None = None,
    rehearse: str | None = None,
    snapshot: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    skip_bad: int = 0,
    cpu: bool = False,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """What the dry run measured, over all ranks: memory of the fullest GPU, time of rank 0.

    Raises:
        SftplanError: There is no such GPU, or a process of the dry run died.
    """
    if plan.inputs.hardware.num_nodes > 1:
        message = f"a dry run is of one machine, the plan has {plan.inputs.hardware.num_nodes}"
        raise UsageError(message, "`--nodes 1` plans for it; `--no-gpu` traces this one")
    if not cpu:
        check_here(plan, rehearse=rehearse is not None)
    ranks = plan.inputs.hardware.num_gpus
    alone = ranks == 1  # several would have to agree on when to end
    request = Request(
        steps=default_steps(plan) if steps is None else steps,
        more_rounds_s=MORE_ROUNDS_S if alone and steps is None and not cpu else 0.0,
        data=None if data is None else found_from_anywhere(data),
        tokenizer=tokenizer,
        skip_bad=skip_bad,
        cap_bytes=None if rehearse is None else cap_bytes(plan, rehearse),
        snapshot=None if snapshot is None else _part(snapshot),
        cpu=cpu,
    )
    limit = timeout_s
    if limit is None:
        limit = START_S + PATIENCE * (plan.time.step_s or 1.0) * (request.steps + 8)
        limit += request.more_rounds_s
    before = None if cpu else all_taken_bytes()
    results = _results(plan, request, ranks, limit, snapshot)
    after = None if cpu else all_taken_bytes()
    found = merged(results)
    found["taken_meanwhile_bytes"] = taken_meanwhile(before, after, results)
    return found


def _results(
    plan: Plan, request: Request, ranks: int, timeout_s: float, snapshot: str | None
) -> list[dict[str, Any]]:
    """What each rank left; the snapshot is in its place, whole, or not there."""
    part = None if request.snapshot is None else Path(request.snapshot)
    with tempfile.TemporaryDirectory(prefix="sftplan-verify-") as name:
        folder = Path(name)
        write_request(plan, request, folder)
        try:
            results = run_processes(folder, ranks, timeout_s=timeout_s)
            if part is not None and part.exists():
                part.replace(str(snapshot))
        finally:
            if part is not None:
                part.unlink(missing_ok=True)
    return results


def check_here(plan: Plan, *, rehearse: bool) -> None:
    """Whether this machine can prove the plan.

    Raises:
        NotReadyError: There is no GPU.
        DriftError: It is another one, or, for a rehearsal, a smaller one.
    """
    try:
        machine = detect()
    except NotReadyError as error:
        hint = (
            "`sftplan verify PLAN --no-gpu` traces the plan here; where the GPU is, "
            "`sftplan verify PLAN` measures it"
        )
        raise NotReadyError(error.message, hint) from None
    check_drift(plan, None if rehearse else machine)
    if rehearse:
        check_larger(plan, machine)


def _part(snapshot: str) -> str:
    """Beside its place, so that it is there whole or not at all."""
    target = Path(snapshot).resolve()
    return str(target.with_name(f".{target.name}.part"))


MOST = ("peak_allocated_bytes", "peak_reserved_bytes", "used_bytes", "outside_bytes")


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of all ranks: the most memory on a GPU, host memory together, times of rank 0.

    >>> ranks = [{"used_bytes": 3, "host_peak_bytes": 1, "step_s": 0.5}, {"used_bytes": 4, "host_peak_bytes": 1}]
    >>> merged(ranks) == {"used_bytes": 4, "host_peak_bytes": 2, "step_s": 0.5}
    True
    """
    for found in results:
        if "out_of_memory" in found:
            return dict(found)
    first = dict(results[0])
    for key in MOST:
        values = [found[key] for found in results if found.get(key) is not None]
        if values:
            first[key] = max(values)
    if "host_peak_bytes" in first:
        first["host_peak_bytes"] = sum(found["host_peak_bytes"] for found in results)
    return first
