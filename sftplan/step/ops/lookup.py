"""Embeddings and the cross-entropy: ops that look rows up by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape

EMBEDDING_ROWS_PER_SEGMENT = 10  # NROWS_PER_THREAD of EmbeddingBackwardKernel.cu
EMBEDDING_SORT_TOKENS = (
    3072  # up to here the backward adds rows directly, aten/native/cuda/Embedding.cu
)


def embedding(tape: Tape, ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table; keeps the indices. The gradient is dense, of the table's size."""
    node = tape.node("embedding", (weight,), _embedding_backward, (ids,))
    out = tape.empty((*ids.shape, weight.shape[-1]), weight.dtype)
    tape.pointwise("embedding", [out, out])
    out.node = node
    return out


def _embedding_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    (gradient,), (ids,) = gradients, saved
    assert gradient is not None
    shape, tokens = node.inputs[0][0], ids.numel
    if tokens <= EMBEDDING_SORT_TOKENS:
        out = tape.empty(shape, gradient.dtype)
    else:
        order = [
            tape.empty((tokens,), DType.INT64) for _ in range(4)
        ]  # sorted ids, places, segments
        out = tape.empty(shape, gradient.dtype)
        segments = min(tokens, shape[0])
        partial = tokens // EMBEDDING_ROWS_PER_SEGMENT + segments
        tape.scratch(4 * partial * shape[1])  # fp32 sums of parts of each segment
        del order
    tape.pointwise("zero", [out])
    tape.pointwise("embedding", [gradient, gradient])
    return [out]


def cross_entropy(tape: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log softmax at the targets: log-softmax keeps its result, the look-up keeps it too."""
    node = tape.node("log_softmax", (logits,), _log_softmax_backward)
    scores = tape.empty(logits.shape, DType.FP32, "logits")
    tape.pointwise("log_softmax", [logits, scores])
    tape.save(node, scores)
    scores.node = node
    node = tape.node("nll_loss", (scores,), _nll_loss_backward, (scores, targets))
    loss = tape.empty((), DType.FP32, "logits")
    tape.save(node, tape.empty((), DType.FP32, "logits"))  # the weights' sum
    loss.node = node
    return loss


def _log_softmax_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    (gradient,), (scores,) = gradients, saved
    assert gradient is not None
    out = tape.empty(scores.shape, scores.dtype, "logits")
    tape.pointwise("log_softmax_backward", [gradient, scores, out])
    return [out]


def _nll_loss_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    scores = saved[0]
    out = tape.empty(scores.shape, scores.dtype, "logits")
    tape.pointwise("zero", [out])
    return [out]
