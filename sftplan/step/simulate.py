"""Whole steps of training, one after the other, on one tape."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from sftplan.facts.params import parameters
from sftplan.facts.strategy import Precision
from sftplan.step.chip import HOPPER, Chip
from sftplan.step.forward import build_buffers, build_weights, head_of, hidden_states
from sftplan.step.loss import head_input, loss_of
from sftplan.step.shard import Shards
from sftplan.step.sharding import Sharding, sharding_of
from sftplan.step.tape import Tape
from sftplan.step.tensor import DType, Tensor
from sftplan.step.traced import play
from sftplan.step.update import Update, clip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.batch import Batch
    from sftplan.step.traced import Pass, Tracer

AUTOCAST = {Precision.FP16_MIXED: DType.FP16, Precision.BF16_MIXED: DType.BF16}
LOW_WEIGHTS = (Precision.BF16_TRUE, Precision.BF16_MASTER)
ONCE: Mapping[int, int] = {}
STEADY_PASSES = 2  # with gradients there from the first pass, the second is like all that follow


def weight_dtype(precision: Precision) -> DType:
    """The type in which weights and gradients live."""
    return DType.BF16 if precision in LOW_WEIGHTS else DType.FP32


def simulate(
    model: ModelShape,
    strategy: Strategy,
    batch: Batch,
    *,
    num_gpus: int = 1,
    num_steps: int = 2,
    chip: Chip = HOPPER,
    times: Mapping[int, int] = ONCE,
    tracer: Tracer | None = None,
) -> Tape:
    """The tape of the first steps of one rank, from the building of the model on.

    The second step is like all that follow: the optimizer's states exist and the allocator's cache is
    warm. Of many accumulated passes only the first few are on the tape. `times`: for how many
    layers one of the model's stands, where for several: some buffers grow with all. `tracer` has the passes
    of a model whose family is not written here.
    """
    sharding = sharding_of(strategy, num_gpus)
    run = _Run(model, strategy, batch, sharding, chip, times=times, tracer=tracer)
    for step in range(num_steps):
        run.step(first=not step)
    run.tape.mark("end")
    return run.tape


def steady(
    model: ModelShape,
    strategy: Strategy,
    batch: Batch,
    *,
    num_gpus: int = 1,
    chip: Chip = HOPPER,
    times: Mapping[int, int] = ONCE,
    tracer: Tracer | None = None,
) -> Tape:
    """The tape of one step as all later ones are: states and, while accumulating, gradients are there.

    One of the accumulated passes stands for all. Peaks in allocated memory and the work of a step are
    those of `simulate`; what an allocator's cache holds from earlier steps is not in it.
    """
    sharding = sharding_of(strategy, num_gpus)
    run = _Run(model, strategy, batch, sharding, chip, passes=1, times=times, tracer=tracer)
    run.settle()
    run.tape.tuned = True
    run.step(first=False)
    run.tape.mark("end")
    return run.tape


class _Run:
    """The training loop's state between steps."""

    def __init__(
        self,
        model: ModelShape,
        strategy: Strategy,
        batch: Batch,
        sharding: Sharding,
        chip: Chip,
        *,
        passes: int = STEADY_PASSES,
        times: Mapping[int, int] = ONCE,
        tracer: Tracer | None = None,
    ) -> None:
        self.model, self.strategy, self.batch = model, strategy, batch
        self.sharding = sharding
        self.passes = min(strategy.accumulation, passes)
        tape = self.tape = Tape(AUTOCAST.get(strategy.precision), chip)
        on_host = sharding.stage == 3  # whence each weight's share is taken
        dtype = weight_dtype(strategy.precision)
        self.weights = build_weights(tape, model, dtype, on_host=on_host)
        self.buffers = build_buffers(tape, model)
        self.traced: Sequence[Pass] = ()
        if model.anatomy is not None:
            assert tracer is not None, f"{model.name} is not modelled and nobody traces it"
            self.traced = tracer(model, strategy, batch, chip)
        # The head is built with a table of its own, which is then let go.
        if model.tied_embeddings and not on_host:
            width = model.embedding_size or model.hidden_size
            tape.scratch(model.vocab_size * width * dtype.size)
        order = self._order(times)
        self.update = Update(strategy, order)
        self.shards: Shards | None = None
        if sharding.uses_deepspeed:
            whole = [self.weights.ordered[place][1] for place in order]
            decayed = [weight.numel for weight in whole if len(weight.shape) > 1]
            others = [weight.numel for weight in whole if len(weight.shape) <= 1]
            self.shards = Shards(tape, self.weights, sharding, (decayed, others))
            self.shards.prepare()
            tape.on_gradient = self.shards.take
        else:
            self.update.prepare(tape, self.weights.ordered)

    def _order(self, times: Mapping[int, int]) -> list[int]:
        """Which weight of the tape stands for each of the whole model's, in that one's order."""
        order: list[int] = []
        numbered = enumerate(layer for layer, _ in self.weights.ordered)
        for layer, places in groupby(numbered, key=itemgetter(1)):
            alike = 1 if layer is None else times.get(layer, 1)
            order += [place for place, _ in places] * alike
        return order

    def settle(self) -> None:
        """Bring the workspaces, the optimizer's states and, of accumulated passes, gradients into being."""
        self.tape.touch_workspace()
        self.tape.touch_workspace(backward=True)
        if self.shards is not None:
            self.shards.create_moments()
        elif not self.update.one_kernel:
            self.update.create(self.tape, self.weights.ordered)
        if self.strategy.accumulation > 1:
            self._settle_gradients()
        self.tape.mark("settled")

    def _settle_gradients(self) -> None:
        """Those of the passes before: one rank's share of them from stage 2 on, else all."""
        if self.sharding.stage >= 2:
            if self.shards is not None:
                self.shards.hold_gradients()
            return
        for layer, weight in self.weights.ordered:
            assert weight.node is not None
            self.tape.enter(layer)
            weight.node.extra = self.tape.empty(weight.shape, weight.dtype, "gradients")

    def step(self, *, first: bool) -> None:
        """One optimizer step."""
        tape, weights = self.tape, self.weights.ordered
        ids = tape.empty((self.batch.rows, self.batch.length), DType.INT64)
        for number in range(self.passes):
            if self.traced:  # a lone pass that stands for accumulated ones is like the last
                place = number if self.passes == len(self.traced) else -1
                play(tape, self.traced[place], self._by_name)
            else:
                self._pass(ids, last=number == self.passes - 1)
        if self.strategy.max_grad_norm:
            tape.mark("clip")
            clip(tape, weights, scales=not self.update.one_kernel)
        tape.mark("optimizer")
        if self.shards is not None:
            self.shards.update(first=first)
        else:
            self.update.step(tape, weights, first=first)
        tape.mark("zero_grad")
        for _, weight in weights:
            assert weight.node is not None
            weight.node.extra = None

    @cached_property
    def _by_name(self) -> dict[str, Tensor]:
        ordered = zip(parameters(self.model), self.weights.ordered, strict=True)
        return {parameter.name: weight for parameter, (_, weight) in ordered}

    def _pass(self, ids: Tensor, *, last: bool) -> None:
        """Forward and backward of one micro-batch."""
        tape, model, strategy = self.tape, self.model, self.strategy
        tape.mark("forward")
        if self.shards is not None:
            self.shards.begin_pass(last=last)
        tape.autocast = tape.autocast_dtype is not None
        x = hidden_states(tape, model, strategy, self.weights, ids, self.batch.documents)
        x = head_input(tape, model, strategy, self.batch, x)
        loss, logits = loss_of(tape, model, strategy, self.batch, head_of(self.weights), x)
        del x, logits
        tape.leave_autocast()
        tape.mark("backward")
        tape.kind = "temporary"
        tape.backward(loss)
        tape.kind = "activations"
        if self.shards is not None:
            tape.mark("backward end")
            self.shards.end_pass(last=last)
