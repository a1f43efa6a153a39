"""Whole steps of training, one after the other, on one tape."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sftplan.facts.strategy import Precision
from sftplan.step.forward import Weights, build_weights, head_of, hidden_states
from sftplan.step.loss import loss_of
from sftplan.step.repeat import FEW_LAYERS
from sftplan.step.tape import HOPPER, Chip, Tape
from sftplan.step.tensor import DType
from sftplan.step.update import Update, clip

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.batch import Batch

AUTOCAST = {Precision.FP16_MIXED: DType.FP16, Precision.BF16_MIXED: DType.BF16}
LOW_WEIGHTS = (Precision.BF16_TRUE, Precision.BF16_MASTER)


def weight_dtype(precision: Precision) -> DType:
    """The type in which weights and gradients live."""
    return DType.BF16 if precision in LOW_WEIGHTS else DType.FP32


def simulate(
    model: ModelShape,
    strategy: Strategy,
    batch: Batch,
    *,
    num_steps: int = 2,
    chip: Chip = HOPPER,
) -> Tape:
    """The tape of the first steps, from the building of the model on.

    The second step is like all that follow: the optimizer's states exist and the allocator's cache
    is warm.
    """
    autocast = AUTOCAST.get(strategy.precision)
    tape = Tape(autocast, chip)
    weights = build_weights(tape, model, weight_dtype(strategy.precision))
    if model.tied_embeddings:  # the head is built with a table of its own, which is then let go
        tape.scratch(model.vocab_size * model.hidden_size * weights.ordered[0][1].dtype.size)
    update = Update(strategy)
    update.prepare(tape, weights.ordered)
    for step in range(num_steps):
        ids = tape.empty((batch.rows, batch.length), DType.INT64)
        for _ in range(strategy.accumulation):
            _pass(tape, model, strategy, batch, weights, ids)
        if strategy.max_grad_norm:
            tape.mark("clip")
            clip(tape, weights.ordered)
        tape.mark("optimizer")
        update.step(tape, weights.ordered, first=not step)
        tape.mark("zero_grad")
        for _, weight in weights.ordered:
            assert weight.node is not None
            weight.node.extra = None
        del ids
    tape.mark("end")
    return tape


def _pass(tape: Tape, model: ModelShape, strategy: Strategy, batch: Batch, weights: Weights, ids):
    """Forward and backward of one micro-batch."""
    tape.mark("forward")
    tape.autocast = tape.autocast_dtype is not None
    x = hidden_states(tape, model, strategy, weights, ids, batch.documents)
    loss = loss_of(tape, model, strategy, batch, head_of(weights), x)
    del x
    tape.leave_autocast()
    tape.mark("backward")
    tape.kind = "temporary"
    tape.backward(loss)
    tape.kind = "activations"


def few_layers(model: ModelShape, seq_len: int) -> ModelShape | None:
    """The model with the few layers that stand for all, or None where layers differ in their ops."""
    if model.num_layers <= FEW_LAYERS or model.dense_layers:
        return None
    window = model.sliding_window
    if model.layer_kinds and window is not None and seq_len > window:
        return None
    return replace(model, num_layers=FEW_LAYERS, layer_kinds=())
