"""One process of a run: everything put together, checked, trained, and the model written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.errors import DriftError, TrainingFailedError, UsageError
from sftplan.facts.captured import is_captured, is_causal
from sftplan.facts.strategy import Precision
from sftplan.plan.timeline import strategy_of
from sftplan.train import checkpoint, loop, saving
from sftplan.train.attention import Kernel, choose_kernel
from sftplan.train.captured import CapturedPasses
from sftplan.train.compiled import loss_functions, prepare_blocks
from sftplan.train.engine import uses_deepspeed
from sftplan.train.evaluate import Evaluation
from sftplan.train.finish import summary_of, write_final
from sftplan.train.inputs import Layout, to_device
from sftplan.train.job import CHECKPOINTS
from sftplan.train.material import Material, gather_material, identity_of
from sftplan.train.metrics import Meter, MetricsFile, peak_flops_per_s, start_tracker
from sftplan.train.model import (
    build_model,
    config_of,
    device_of,
    place_to_build,
    product_dtype,
    without_pad_token,
)
from sftplan.train.packing_check import check_packing
from sftplan.train.progress import Progress
from sftplan.train.schedule import Schedule
from sftplan.train.sharded import ShardedUpdate
from sftplan.train.state import Run
from sftplan.train.step import LossScale, Stepper
from sftplan.train.update import Update
from sftplan.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sftplan.facts.model import ModelShape
    from sftplan.plan.record import Plan
    from sftplan.plan.record_inputs import StrategyRecord
    from sftplan.train.job import Job
    from sftplan.train.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which process this is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place_of_process() -> Place:
    """From the environment that torchrun sets; alone without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SFTPLAN_RANKS" not in os.environ:
        return Place()
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )


def build_stepper(
    strategy: StrategyRecord, config: Any, kernel: Kernel, settings: Settings, *,
    device: torch.device, deepspeed: Mapping[str, Any], weights: str | None = None,
    world_size: int = 1,
) -> Stepper:  # fmt: skip
    """Model, optimizer and loss of a plan, as training and the dry run use them."""
    sharded = uses_deepspeed(strategy)
    model = build_model(
        config, precision=strategy.precision, attention=kernel.name, weights=weights,
        device=place_to_build(strategy.zero, device, world_size), seed=settings.seed, drawn_on=device,
    )  # fmt: skip
    redraws = prepare_blocks(
        model, checkpointing=strategy.checkpointing, checkpointed_layers=strategy.checkpointed_layers,
        compiled=strategy.compile, captured=kernel.captured,
    )  # fmt: skip
    response, chunk = loss_functions(compiled=strategy.compile)
    update: Update | ShardedUpdate
    captured = None
    if sharded:
        update = ShardedUpdate(
            model, strategy=strategy, planned=deepspeed, settings=settings,
            device=device, world_size=world_size,
        )  # fmt: skip
    else:
        update = Update(
            model, precision=strategy.precision, kind=strategy.optimizer, settings=settings,
            world_size=world_size,
        )  # fmt: skip
        if kernel.captured:
            captured = CapturedPasses(update.parameters, update.summed, redraws)
    return Stepper(
        model=model, update=update, precision=strategy.precision, loss=strategy.loss,
        max_grad_norm=strategy.max_grad_norm, device=device, world_size=world_size,
        captured=captured,
        scale=LossScale() if strategy.precision is Precision.FP16_MIXED else None,
        response=response, chunk=chunk,
    )  # fmt: skip


def kernel_of(plan: Plan, shape: ModelShape, config: Any, device: torch.device) -> Kernel:
    """The attention that a plan's steps run with on `device`."""
    strategy, seq_len = strategy_of(plan.strategy), plan.inputs.workload.seq_len
    return choose_kernel(
        strategy.attention, device=device, low=product_dtype(strategy.precision), config=config,
        causal=is_causal(strategy, shape, seq_len), captured=is_captured(strategy, shape, seq_len),
    )  # fmt: skip


def run_job(job: Job, material: Material | None = None) -> dict[str, Any]:
    """Train; the run's summary. `material` is what was checked already, if it was in this process."""
    place = place_of_process()
    material = material or gather_material(job, world_size=place.world_size)
    device = device_of(cpu=job.settings.cpu, local_rank=place.local_rank)
    _check_device(job.plan, device)
    if place.world_size > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    progress = Progress(quiet=job.quiet or place.rank > 0)
    run = assemble(job, material, place, device, progress)
    with without_pad_token(run.stepper.model):
        progress.start(total=run.last_step, done=run.done)
        try:
            loop.train(run)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(job.plan, run, error) from None
        finally:
            progress.close()
            if run.metrics is not None:
                run.metrics.close()
            if run.tracker is not None:
                run.tracker.finish()
    summary = summary_of(run, material)
    write_final(job, run, material)
    return summary


def _out_of_memory(plan: Plan, run: Run, error: Exception) -> TrainingFailedError:
    reserved = format_gib(torch.cuda.max_memory_reserved())
    predicted = format_gib(plan.memory.gpu.peak_reserved_bytes)
    message = (
        f"step {run.done + 1}: out of GPU memory with {reserved} GiB reserved, "
        f"{predicted} predicted: {str(error).splitlines()[0]}"
    )
    return TrainingFailedError(message, "`sftplan verify PLAN` shows where the prediction is wrong")


def _check_device(plan: Plan, device: torch.device) -> None:
    """The GPU has to be of the size that was planned for."""
    if device.type != "cuda":
        return
    gpu = plan.inputs.hardware.gpu
    found = torch.cuda.get_device_properties(device)
    planned = gpu.memory_bytes - gpu.unusable_bytes
    if found.total_memory < 0.9 * planned:
        message = (
            f"the plan is for {gpu.name} with {planned:,} bytes, "
            f"this {found.name} has {found.total_memory:,}"
        )
        raise DriftError(message, "plan again, with --hardware auto")


def assemble(
    job: Job, material: Material, place: Place, device: torch.device, progress: Progress
) -> Run:
    """The run, at its beginning or where its newest checkpoint stands."""
    plan, settings = job.plan, job.settings
    config = config_of(material.shape, attention_dropout=plan.strategy.attention_dropout)
    kernel = kernel_of(plan, material.shape, config, device)
    layout = Layout(flat=kernel.flat, packed=plan.strategy.packing)
    stepper = build_stepper(
        plan.strategy, config, kernel, settings, device=device, deepspeed=plan.launch.deepspeed,
        weights=material.weights, world_size=place.world_size,
    )  # fmt: skip
    batches = material.training
    evaluation = None
    if material.held_out is not None:
        responses, everything = material.held_out
        evaluation = Evaluation(
            responses=responses, all_tokens=everything, layout=layout, rank=place.rank
        )
    run = Run(
        stepper=stepper, batches=batches, layout=layout, settings=settings,
        schedule=Schedule(
            peak=settings.learning_rate, floor=settings.min_learning_rate,
            warmup_steps=settings.warmup_steps(batches.num_steps), num_steps=batches.num_steps,
        ),
        checkpoints=job.out / CHECKPOINTS, metrics=None, progress=progress, evaluation=evaluation,
        meter=_meter(plan, device, place.world_size), rank=place.rank,
        identity=identity_of(job, material, kernel=kernel.name),
    )  # fmt: skip
    _introduce(run, material, kernel)
    _resume(job, run)
    if place.rank == 0:
        run.metrics = MetricsFile(job.out, done=run.done)
        if settings.tracker is not None:
            run.tracker = start_tracker(settings.tracker, job.out, run.identity)
    return run


def _meter(plan: Plan, device: torch.device, world_size: int) -> Meter:
    cuda = device.type == "cuda"
    peak = peak_flops_per_s(plan) if cuda else None
    return Meter(
        flops_per_token=float(plan.compute.flops_per_token) if cuda else None,
        peak_flops_per_s=None if peak is None else peak * world_size,
        predicted_reserved_bytes=plan.memory.gpu.peak_reserved_bytes,
        device=device,
    )


def _introduce(run: Run, material: Material, kernel: Kernel) -> None:
    """Say what is trained on, and check that packed documents do not see each other."""
    fitted, say = material.prepared.fitted, run.progress.say
    held_out = 0 if material.held_out is None else len(material.held_out[0].examples)
    say(
        f"{len(run.batches.examples):,} examples to train on, {held_out:,} held out, "
        f"{len(fitted.dropped):,} dropped as too long, {fitted.num_cut:,} cut, "
        f"{len(material.prepared.skipped):,} skipped; {run.batches.num_steps:,} steps"
    )
    for note in (*material.prepared.notes, *([kernel.note] if kernel.note else [])):
        say(note)
    if run.layout.packed:
        batch = run.batches.step(0, 0, rank=run.rank).micro_batches[0]
        inputs = to_device(batch, run.layout, run.stepper.device)
        found = check_packing(run.stepper, batch, inputs)
        if found is not None:
            say(str(found))


def _resume(job: Job, run: Run) -> None:
    """Restore the newest complete checkpoint if that is wanted; else start the generators afresh."""
    if job.resume:
        if run.rank == 0:
            checkpoint.clear_leftovers(run.checkpoints)
        folder = checkpoint.newest(run.checkpoints, say=run.progress.say)
        _check_same(run, folder)
        if folder is not None:
            saving.restore(run, folder)
            run.progress.say(f"going on after step {run.done:,} of {run.last_step:,}")
            return
        run.progress.say("no complete checkpoint: starting from the beginning")
    torch.manual_seed(job.settings.seed + 1 + run.rank)


def _check_same(run: Run, folder: Path | None) -> None:
    """All ranks have to go on from the same step, on whichever machine they are."""
    if run.stepper.world_size == 1:
        return
    step = -1 if folder is None else int(folder.name.rpartition("-")[2])
    steps = torch.tensor([step, -step], device=run.stepper.device)
    distributed.all_reduce(steps, op=distributed.ReduceOp.MAX)
    highest, lowest = int(steps[0]), -int(steps[1])
    if highest != lowest:
        message = f"rank {run.rank} finds step {step}, others find {lowest} to {highest}"
        raise UsageError(message, "--out has to be a folder that all machines share")
