"""A dry run inside its process: build, the worst batch, then typical ones; numbers come back.

The model has random weights, of which neither memory nor time depends, and nothing is written.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.train.captured import EAGER_STEPS
from sftplan.train.inputs import Layout, to_device
from sftplan.train.job import Job
from sftplan.train.launch import versions
from sftplan.train.material import check_supported, gather_material, shape_of
from sftplan.train.metrics import finite, peak_flops_per_s
from sftplan.train.model import config_of, device_of, without_pad_token
from sftplan.train.session import build_stepper, kernel_of, place_of_process
from sftplan.train.settings import Settings
from sftplan.train.step import Reading, train_step
from sftplan.verify.live import Recorder
from sftplan.verify.occupancy import taken_bytes
from sftplan.verify.phases import MemoryWatch, Place
from sftplan.verify.timed import MOST_STEPS, Timing, typical_steps
from sftplan.verify.worst import made_up_batches, worst_micro_batch

if TYPE_CHECKING:
    from sftplan.data.batches import Batches
    from sftplan.plan.record import Plan
    from sftplan.train.inputs import Inputs, Ready
    from sftplan.train.step import Outcome, Stepper
    from sftplan.verify.request import Request

# The first creates the optimizer's states, the second fills the cache; where passes are captured, that
# is when their pool is filled, and replays allocate nothing: it has to be seen.
UNSTEADY_STEPS = 2
WORST_STEPS = 2  # measured ones
WORST_PASSES = 2  # from the second pass on gradients are there: all later ones are like it
KIB = 1024
PAST_PYTORCH = ("CUDA error: out of memory", "_ALLOC_FAILED")


@dataclass(slots=True, kw_only=True)
class DryRun:
    """What the steps of a dry run work with."""

    plan: Plan
    request: Request
    device: torch.device
    rank: int
    world_size: int
    taken_before_bytes: int | None
    at: Place
    note: str | None = None


def dry_run(
    plan: Plan, request: Request, *, taken_before_bytes: int | None = None
) -> dict[str, Any]:
    """Everything that was measured, or where memory ran out; JSON's types only.

    `taken_before_bytes` is what was taken on this GPU before this process created its context, for
    a process that makes several dry runs; without it, now is before.
    """
    check_supported(plan)
    place = place_of_process()
    before = taken_before_bytes
    if before is None and not request.cpu:
        before = taken_bytes(place.local_rank)
    device = device_of(cpu=request.cpu, local_rank=place.local_rank)
    _cap(request, device)
    if place.world_size > 1:
        distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    run = DryRun(
        plan=plan, request=request, device=device, rank=place.rank, at=Place(),
        world_size=place.world_size, taken_before_bytes=before,
    )  # fmt: skip
    try:
        found = _measured(run)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = {"out_of_memory": _out_of_memory(run, error)}
    return finite({**found, "versions": _versions(device), "note": run.note})  # type: ignore[no-any-return]


def is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch's own error, or that of a library which takes memory past PyTorch.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    True
    >>> is_out_of_memory(RuntimeError("shape mismatch"))
    False
    """
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in PAST_PYTORCH)


def _cap(request: Request, device: torch.device) -> None:
    """Leave PyTorch no more than a smaller card would."""
    if request.cap_bytes is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, request.cap_bytes / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def _measured(run: DryRun) -> dict[str, Any]:
    stepper, layout, found = _built(run)
    if run.device.type == "cuda":  # as training does before its first step
        torch.cuda.empty_cache()
    recording = run.request.timeline and run.device.type == "cuda"
    recorder = Recorder(stepper, on=recording, snapshot=run.request.snapshot)
    with without_pad_token(stepper.model):
        worst = worst_micro_batch(found)
        passes = min(run.plan.strategy.accumulation, WORST_PASSES)
        inputs = [to_device(worst, layout, run.device)] * passes
        memory, first_s = _worst_steps(run, stepper, inputs, worst.num_targets, recorder)
        outside, used = _outside_bytes(run), _used_bytes(run)  # the host's probe takes some, too
        del inputs
        time_found = _typical_steps(run, stepper, found, layout)
    return {
        **memory,
        **time_found,
        "first_step_s": first_s,
        "timeline": recorder.timeline,
        "outside_bytes": outside,
        "outside_later_bytes": _outside_bytes(run),
        "host_peak_bytes": _host_peak_bytes(),
        "used_bytes": used,
    }


def _built(run: DryRun) -> tuple[Stepper, Layout, Batches]:
    """The stepper as training builds it, and batches that training would see."""
    plan, strategy, request = run.plan, run.plan.strategy, run.request
    shape = shape_of(plan)
    settings = Settings(
        random_weights=True,
        cpu=request.cpu,
        tokenizer=request.tokenizer,
        skip_bad=request.skip_bad,
        train_on_prompt=plan.inputs.workload.train_on_prompt,
    )
    config = config_of(shape, attention_dropout=strategy.attention_dropout)
    kernel = kernel_of(plan, shape, config, run.device)
    run.note = kernel.note
    num_steps = MOST_STEPS if request.more_rounds_s else UNSTEADY_STEPS + request.steps + 1
    if request.data is None:
        found = made_up_batches(plan, num_steps=num_steps, world_size=run.world_size)
    else:
        job = Job(plan=plan, data=request.data, out=Path(), settings=settings)
        found = gather_material(job, world_size=run.world_size).training
        found = replace(found, epochs=max(found.epochs, num_steps / found.steps_per_epoch))
    stepper = build_stepper(
        strategy, config, kernel, settings, device=run.device, deepspeed=plan.launch.deepspeed,
        world_size=run.world_size,
    )  # fmt: skip
    return stepper, Layout(flat=kernel.flat, packed=strategy.packing), found


def _step(run: DryRun, stepper: Stepper, inputs: Any, num_targets: int) -> Outcome:
    run.at.step += 1
    return train_step(
        stepper, inputs, num_targets=max(num_targets, 1), learning_rate=Settings().learning_rate
    )


def _worst_steps(
    run: DryRun, stepper: Stepper, inputs: list[Inputs], targets: int, recorder: Recorder
) -> tuple[dict[str, Any], float]:
    """Memory of steady steps of nothing but the worst batch, and seconds of the first step."""
    watch = MemoryWatch(run.device)

    def mark(phase: str) -> None:
        run.at.mark(phase)
        watch.mark(phase)

    watched = replace(stepper, mark=mark)
    targets *= len(inputs) * run.world_size
    start, first_s = time.perf_counter(), 0.0
    unsteady = UNSTEADY_STEPS if stepper.captured is None else EAGER_STEPS
    for number in range(unsteady + WORST_STEPS):
        if number == unsteady:
            watch.restart()
        outcome = _step(run, watched, inputs, targets)
        Reading(outcome.loss).values()
        first_s = first_s or time.perf_counter() - start
    watch.settle()
    recorder.record(lambda recording: _step(run, recording, inputs, targets))
    found = {
        "peak_allocated_bytes": watch.allocated_bytes,
        "peak_reserved_bytes": watch.reserved_bytes or None,
        "phase_peak_bytes": watch.peaks,
    }
    return found, first_s


def _typical_steps(run: DryRun, stepper: Stepper, found: Batches, layout: Layout) -> dict[str, Any]:
    """Times of the steps that training would take."""
    timing = Timing(
        steps=run.request.steps, unsteady=UNSTEADY_STEPS, most_s=run.request.more_rounds_s
    )

    def step(marked: Stepper, ready: Ready) -> Outcome:
        return _step(run, marked, ready.inputs, ready.step.num_targets)

    shown = replace(stepper, mark=run.at.mark)
    times = typical_steps(timing, shown, found, layout, step=step, rank=run.rank)
    return {**times, "mfu_fraction": _mfu(run, times["tokens_per_s"])}


def _mfu(run: DryRun, tokens_per_s: float) -> float | None:
    """The share of the peak of all ranks, by the plan's count of FLOPs."""
    peak = peak_flops_per_s(run.plan) if run.device.type == "cuda" else None
    if not peak:
        return None
    return run.plan.compute.flops_per_token * tokens_per_s / (peak * run.world_size)


def _used_bytes(run: DryRun) -> int | None:
    """What the driver shows of this process: all that is taken, less what was before."""
    now = None if run.device.type != "cuda" else taken_bytes(run.device.index)
    if now is None or run.taken_before_bytes is None:
        return None
    return now - run.taken_before_bytes


def _outside_bytes(run: DryRun) -> int | None:
    """Context, loaded kernels and what other processes have taken meanwhile."""
    used = _used_bytes(run)
    return None if used is None else used - torch.cuda.memory_reserved(run.device)


def _host_peak_bytes() -> int:
    """The most memory that this process was resident with; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def _out_of_memory(run: DryRun, error: Exception) -> dict[str, Any]:
    """The phase and the numbers of an allocation that failed."""
    free, total = torch.cuda.mem_get_info(run.device)
    return {
        "phase": run.at.phase,
        "step": run.at.step,
        "allocated_bytes": torch.cuda.memory_allocated(run.device),
        "reserved_bytes": torch.cuda.memory_reserved(run.device),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(run.device),
        "free_bytes": free,
        "total_bytes": total,
        "taken_before_bytes": run.taken_before_bytes,
        "outside_bytes": _outside_bytes(run),
        "message": str(error).splitlines()[0],
    }


def _versions(device: torch.device) -> dict[str, str | None]:
    """Of what decides on the numbers."""
    found = dict(versions())
    if device.type == "cuda":
        from sftplan.detect.nvml import read_driver_version

        found |= {"cuda": torch.version.cuda, "driver": read_driver_version()}
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
