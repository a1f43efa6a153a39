"""From hidden states to the loss: over all positions, over the responses, or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Loss
from sftplan.step.blocks.compiled import compiled_loss
from sftplan.step.compiled.head import column_parts, head_columns
from sftplan.step.ops.lookup import cross_entropy
from sftplan.step.ops.matmul import linear, matmul
from sftplan.step.ops.pointwise import add, scale, sum_rows, tanh
from sftplan.step.ops.shape import keep_rows, pad_rows, slice_last, view
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.autograd import Node
    from sftplan.step.batch import Batch
    from sftplan.step.tape import Tape

CHUNK_ROWS = 2048  # positions whose logits are alive at once under the chunked loss


def loss_of(
    tape: Tape,
    model: ModelShape,
    strategy: Strategy,
    batch: Batch,
    head: tuple[Tensor, Tensor | None],
    x: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The loss of what enters the head, `head_input`; `head` is the LM head's weight and bias.

    With it the logits, where the model returns them: they outlive x.
    """
    kind, tape.kind = tape.kind, "logits"
    logits = None
    if strategy.loss is Loss.FULL:
        loss, logits = _full(tape, model, batch, head, x)
    elif strategy.loss is Loss.RESPONSE:
        plain = head[1] is None and model.logit_softcap is None
        if strategy.compile and plain:
            loss = compiled_loss(tape, model, head[0], x)
        else:
            loss = _response(tape, model, head, x)
    else:
        loss = _chunked(tape, model, head, x, compiled=strategy.compile)
    tape.kind = kind
    return loss, logits


def head_input(
    tape: Tape, model: ModelShape, strategy: Strategy, batch: Batch, x: Tensor
) -> Tensor:
    """Of hidden states (B, T, d) those that reach the head: all, or a row per target."""
    if strategy.loss is Loss.FULL:
        return x
    rows = view(tape, x, batch.num_tokens, x.shape[-1])
    return keep_rows(tape, rows, batch.num_targets)


def _softcap(tape: Tape, model: ModelShape, logits: Tensor) -> Tensor:
    if model.logit_softcap is not None:
        logits = scale(tape, tanh(tape, scale(tape, logits)))
    return logits


def _full(
    tape: Tape, model: ModelShape, batch: Batch, head: tuple[Tensor, Tensor | None], x: Tensor
) -> tuple[Tensor, Tensor]:
    """transformers' ForCausalLMLoss: every position in fp32, targets padded by one and shifted."""
    logits = _softcap(tape, model, linear(tape, x, *head))
    return _causal_lm_loss(tape, batch, logits), logits


def _causal_lm_loss(tape: Tape, batch: Batch, logits: Tensor) -> Tensor:
    logits = tape.cast(logits, DType.FP32)
    padded = tape.empty((batch.rows, batch.length + 1), DType.INT64)
    targets = tape.empty((batch.rows, batch.length), DType.INT64)
    loss = cross_entropy(tape, logits, targets)
    del padded
    return loss


def _response(
    tape: Tape, model: ModelShape, head: tuple[Tensor, Tensor | None], x: Tensor
) -> Tensor:
    weight, bias = head
    columns = head_columns(model.vocab_size)
    if columns != model.vocab_size:
        dtype = tape.autocast_dtype if tape.autocast else None
        low = tape.cast(weight, dtype or weight.dtype)  # by name, which no cache of autocast keeps
        weight = pad_rows(tape, low, columns)
        del low
    logits = linear(tape, x, weight)
    if columns != model.vocab_size:
        logits = slice_last(tape, logits, model.vocab_size)
    if bias is not None:
        logits = add(tape, logits, bias)
    logits = tape.cast(_softcap(tape, model, logits), DType.FP32)
    targets = tape.empty((x.shape[0],), DType.INT64)
    return cross_entropy(tape, logits, targets)


def _chunked(
    tape: Tape, model: ModelShape, head: tuple[Tensor, Tensor | None], x: Tensor, *, compiled: bool
) -> Tensor:
    """Loss and gradients chunk by chunk in the forward pass; the backward pass only hands them on.

    The weight's gradient is added at once to that of the passes before, unless DeepSpeed has that.
    """
    weight = head[0]
    node = tape.node("chunked_loss", (x, weight), _chunked_backward)
    low = tape.low(x)
    table = weight if weight.dtype is low.dtype else tape.cast_gradient(weight, low.dtype)
    columns = head_columns(model.vocab_size)
    hidden_gradient = tape.empty(low.shape, low.dtype, "activations")
    assert weight.node is not None
    onto = weight.node.extra if tape.on_gradient is None else None
    weight_gradient = onto or tape.empty(weight.shape, weight.dtype, "gradients")
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = min(CHUNK_ROWS, x.shape[0] - start)
        gradient = _chunk(tape, rows, columns, weight_gradient, low.dtype, compiled=compiled)
        if head[1] is not None:  # the bias' gradient is summed in fp32
            summed = tape.empty((rows, model.vocab_size), DType.FP32)
            sum_rows(tape, summed, tape.empty((model.vocab_size,), DType.FP32))
            del summed
        del gradient
    del table  # its copy, if it is one, lives as long as products read it
    for kept in (hidden_gradient,) if onto else (hidden_gradient, weight_gradient):
        tape.save(node, kept)
    loss = tape.empty((), DType.FP32)
    loss.node = node
    return loss


def _chunk(
    tape: Tape, rows: int, columns: int, weight_gradient: Tensor, dtype: DType, *, compiled: bool
) -> Tensor:
    """One chunk: its logits, which have become their gradient."""
    vocab, size = weight_gradient.shape
    parts = column_parts(vocab)
    logits = tape.empty((rows, columns), dtype)
    for part in parts:
        matmul(tape, "linear", rows, part, size, logits)
    if compiled:
        tape.tune()
        tape.pointwise("online_softmax", [logits])
        tape.pointwise("cross_entropy_backward", [logits, logits])
    else:
        _softmax_in_place(tape, logits)
    for part in parts:
        matmul(tape, "linear", rows, size, part, logits)
    if weight_gradient.dtype is dtype:
        for part in parts:
            matmul(tape, "linear", part, size, rows, weight_gradient)
        tape.pointwise("add_", [weight_gradient])  # what it is added to is read
    else:
        for part in parts:
            product = tape.empty((part, size), dtype)
            matmul(tape, "linear", part, size, rows, product)
            share = Tensor(product.shape, weight_gradient.dtype, weight_gradient.storage)
            tape.pointwise("add_", [share, product, share])
            del product
    return logits


def _softmax_in_place(tape: Tape, logits: Tensor) -> None:
    """Kernel by kernel, in fp32."""
    scores = logits
    if logits.dtype is not DType.FP32:
        scores = tape.empty(logits.shape, DType.FP32)
        tape.pointwise("cast", [logits, scores])
    for kind, moved in (("amax", 1), ("by_row", 2), ("exp", 2), ("total", 1), ("by_row", 2)):
        tape.pointwise(kind, [scores] * moved)
    if scores is not logits:
        tape.pointwise("cast", [scores, logits])


def _chunked_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    for kept in saved:  # times the loss's own gradient
        tape.pointwise("mul", [kept, Tensor((), DType.FP32, kept.storage), kept])
    return [saved[0], saved[1] if len(saved) > 1 else None]
