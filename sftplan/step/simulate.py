"""Whole steps of training, one after the other, on one tape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Precision, Strategy
from sftplan.step.forward import build_weights, full_loss, hidden_states
from sftplan.step.tape import Tape
from sftplan.step.tensor import DType, Tensor
from sftplan.step.update import Optimizer, clip

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape

AUTOCAST = {Precision.FP16_MIXED: DType.FP16, Precision.BF16_MIXED: DType.BF16}


def simulate(model: ModelShape, strategy: Strategy, seq_len: int, num_steps: int = 2, workspace_bytes: int = 0) -> Tape:
    autocast = AUTOCAST.get(strategy.precision)
    tape = Tape(autocast, workspace_bytes)
    dtype = DType.BF16 if strategy.precision in (Precision.BF16_TRUE, Precision.BF16_MASTER) else DType.FP32
    weights = build_weights(tape, model, dtype)
    if model.tied_embeddings:
        tape.scratch(model.vocab_size*model.hidden_size*dtype.size)
    optimizer = Optimizer()
    for step in range(num_steps):
        ids = tape.empty((strategy.micro_batch, seq_len), DType.INT64, "activations")
        for _ in range(strategy.accumulation):
            tape.mark("forward")
            tape.autocast = autocast is not None
            x = hidden_states(tape, model, strategy, weights, ids)
            loss = full_loss(tape, model, weights, x, ids)
            del x
            tape.leave_autocast()
            tape.mark("backward")
            tape.kind = "temporary"
            tape.backward(loss)
            tape.kind = "activations"
            del loss
        if strategy.max_grad_norm:
            tape.mark("clip")
            clip(tape, weights.ordered)
        tape.mark("optimizer")
        optimizer.step(tape, weights.ordered)
        tape.mark("zero_grad")
        for _, w in weights.ordered:
            w.node.extra = None
        del ids
    tape.mark("end")
    return tape
