"""A plan's own training step, traced: the real model, the very function that training runs."""

from __future__ import annotations

from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sftplan.errors import NotReadyError
from sftplan.facts.captured import is_causal
from sftplan.facts.strategy import Offload, Optimizer
from sftplan.plan.timeline import strategy_of
from sftplan.train import update as update_module
from sftplan.train.attention import choose_kernel
from sftplan.train.inputs import Layout, to_device
from sftplan.train.material import shape_of
from sftplan.train.model import config_of, product_dtype, weight_dtype, without_pad_token
from sftplan.train.session import build_stepper
from sftplan.train.settings import Settings
from sftplan.train.step import train_step
from sftplan.verify.trace.accumulation import added_in_place, root
from sftplan.verify.trace.eight_bit import Library
from sftplan.verify.trace.one_kernel import MasterAdamW
from sftplan.verify.trace.recorder import Recorder
from sftplan.verify.trace.stand_in import DEVICE, as_on_cuda
from sftplan.verify.worst import made_up_batches, worst_micro_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sftplan.plan.record import Plan
    from sftplan.step.chip import Chip
    from sftplan.train.inputs import Inputs
    from sftplan.train.step import Stepper

STEPS = 2  # the first creates the optimizer's states, all later ones are like the second
ZERO_GRAD = "zero_grad"  # as the tape calls the end of a step
PASSES = 3  # of accumulated ones: the first, a middle one, the last, as on the tape


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Events as a tape has them, of a whole step or several; `makers` are operators."""

    events: list[int]
    sizes: list[int]
    kinds: list[str]
    makers: list[str]
    marks: list[tuple[int, str]]
    phases: list[str]  # in which each storage was born
    step_flops: int  # of the last step: products and attention, nothing counted twice
    num_ops: int


@contextmanager
def recording(
    chip: Chip, *, documents: tuple[int, ...] = (), packed: bool = False
) -> Iterator[Recorder]:
    """Whatever runs inside runs on fake tensors, as on a GPU like `chip`, and is written down."""
    with faked(chip, packed=packed), Recorder(chip, documents) as recorder:
        yield recorder


@contextmanager
def faked(chip: Chip, *, packed: bool) -> Iterator[None]:
    """Whatever runs inside runs on fake tensors, as on a GPU like `chip`."""
    with as_on_cuda(chip, packed=packed), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def trace_of(recorder: Recorder) -> Trace:
    """What was recorded, with gradients added in place."""
    events, owner, dropped = added_in_place(recorder.events, recorder.sums)
    kinds = list(recorder.kinds)
    for number in owner:
        kinds[root(owner, number)] = kinds[number]
    marks = [(position - bisect_left(dropped, position), name) for position, name in recorder.marks]
    last = [position for position, name in recorder.marks if name == ZERO_GRAD][-2]
    return Trace(
        events=events,
        sizes=recorder.sizes,
        kinds=kinds,
        makers=recorder.makers,
        phases=recorder.phases,
        marks=marks,
        step_flops=sum(count for position, count in recorder.flops if position > last),
        num_ops=recorder.num_ops,
    )


def trace_plan(plan: Plan, chip: Chip) -> Trace:
    """Two steps of one rank, with nothing sharded and nothing compiled.

    Raises:
        NotReadyError: PyTorch's fake kernels do not know this step.
        DriftError: The model has changed since it was planned for.
    """
    strategy = plan.strategy
    plan = replace(plan, strategy=replace(strategy, zero=0, offload=Offload.NONE, compile=False))
    shape = shape_of(plan)
    if shape.experts is not None and weight_dtype(strategy.precision) is not torch.bfloat16:
        message = f"--precision {strategy.precision} cannot be traced with experts: fake grouped products are bf16"
        raise NotReadyError(
            message, "`sftplan verify PLAN` on the GPU, or `--precision bf16-master`"
        )
    config = config_of(shape, attention_dropout=strategy.attention_dropout)
    kernel = choose_kernel(
        strategy.attention, device=torch.device("cuda"), low=product_dtype(strategy.precision),
        config=config, causal=is_causal(strategy_of(strategy), shape, plan.inputs.workload.seq_len),
    )  # fmt: skip
    layout = Layout(flat=kernel.flat, packed=strategy.packing)
    real = to_device(
        worst_micro_batch(made_up_batches(plan, num_steps=1, world_size=1)), layout,
        torch.device(DEVICE),
    )  # fmt: skip
    documents = _documents(real)
    with (
        _optimizers_here(plan),
        recording(chip, documents=documents, packed=strategy.packing) as recorder,
    ):
        stepper = _stepper(plan, config, kernel)
        inputs = [_fake(real)] * min(strategy.accumulation, PASSES)
        recorder.relabel(stepper.model.parameters(), "weights")
        recorder.relabel(stepper.update.state().values(), "optimizer")
        with without_pad_token(stepper.model):
            for _ in range(STEPS):
                _step(recorder, stepper, inputs)
        recorder.mark("end")
        trace = trace_of(recorder)
    return replace(trace, step_flops=trace.step_flops * strategy.accumulation // len(inputs))


def _stepper(plan: Plan, config: Any, kernel: Any) -> Stepper:
    """As training builds it, its passes not captured; a loss scale waits for the device, and has no memory."""
    built = build_stepper(
        plan.strategy, config, kernel, Settings(random_weights=True),
        device=torch.device(DEVICE), deepspeed={},
    )  # fmt: skip
    return replace(built, scale=None, captured=None)


@contextmanager
def _optimizers_here(plan: Plan) -> Iterator[None]:
    """Optimizers whose kernels need a GPU, as memory sees them: their states are as large without."""
    places: dict[str, Any] = {"_has_triton": lambda _: True, "_master_adamw": lambda: MasterAdamW}
    if plan.strategy.optimizer is Optimizer.ADAMW_8BIT:  # it asks the device whether to skip
        places |= {"_bitsandbytes": lambda: Library, "_is_set": lambda _: False}
    with patch.multiple(update_module, **places):
        yield


def _step(recorder: Recorder, stepper: Stepper, inputs: Sequence[Inputs]) -> None:
    """One step of `train_step`, its phases marked and what it makes called by name."""

    def mark(phase: str) -> None:
        if phase == "optimizer":
            grads = (p.grad for p in stepper.update.parameters)
            recorder.relabel([g for g in grads if g is not None], "gradients")
        recorder.mark(ZERO_GRAD if phase == "end" else phase)

    train_step(
        replace(stepper, mark=mark), inputs, num_targets=1,
        learning_rate=Settings().learning_rate,
    )  # fmt: skip
    recorder.relabel(stepper.update.state().values(), "optimizer")


def _fake(real: Inputs) -> Inputs:
    """The same shapes without data."""
    tensors: dict[str, Any] = {
        field.name: torch.empty_like(value, device=DEVICE)
        for field in fields(real)
        if isinstance(value := getattr(real, field.name), torch.Tensor)
    }
    return replace(real, **tensors)


def _documents(real: Inputs) -> tuple[int, ...]:
    """Lengths of the documents of a flat row; none where rows are not flat."""
    if real.cu_seqlens is None:
        return ()
    return tuple(stop - start for start, stop in pairwise(real.cu_seqlens.tolist()))
