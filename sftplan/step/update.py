"""What follows the backward pass: clipping and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.step.tape import Tape

FOREACH_CHUNK_ELEMENTS = 65536  # kChunkSize of aten/native/cuda/MultiTensorApply.cuh


def clip(tape: Tape, weights: Sequence[tuple[int | None, Tensor]]) -> None:
    """torch.nn.utils.clip_grad_norm_ with foreach kernels: a partial sum per chunk, a norm per tensor."""
    chunks = max(-(-w.numel // FOREACH_CHUNK_ELEMENTS) for _, w in weights)
    partial = tape.empty((len(weights), chunks), DType.FP32, "temporary")
    norms = []
    for layer, weight in weights:
        tape.owner = layer
        norms.append(tape.empty((), weight.dtype, "temporary"))
        tape.pointwise("norm", [weight])
        tape.pointwise("clip", [weight, weight])
    tape.owner = None
    del partial
    stacked = tape.empty((len(weights),), norms[0].dtype, "temporary")
    total = tape.empty((), norms[0].dtype, "temporary")
    norms.clear()
    del stacked, total


class Optimizer:
    """torch.optim.AdamW with its fused kernel: two moments and a step counter per tensor."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def step(self, tape: Tape, weights: Sequence[tuple[int | None, Tensor]]) -> None:
        """One update; the first creates the states."""
        for layer, weight in weights if not self.states else ():
            tape.owner = layer
            self.states.append(tape.empty((), DType.FP32, "optimizer"))
            for _ in ("exp_avg", "exp_avg_sq"):
                self.states.append(tape.empty(weight.shape, weight.dtype, "optimizer"))
        tape.owner = None
        for _, weight in weights:
            tape.pointwise("adamw", [weight] * 7)
