"""The loss: of all positions, of the responses, or of the responses in chunks.

Every loss is Σ −log p(target), times `factor`: one over the targets of the whole step, over all
passes and ranks. Positions without a target take no part, so that a prompt's share is exactly 0.
Scores are fp32 from the logits on. The head's product may be padded to more columns (`head_columns`),
its weight in the model never is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sftplan.data.collate import IGNORED
from sftplan.step.compiled.head import column_parts, head_columns
from sftplan.step.loss import CHUNK_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The LM head's weight (V, d) and bias, and the cap on its logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None


def head_of(model: Any) -> Head:
    """The head of a transformers model."""
    layer = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(weight=layer.weight, bias=getattr(layer, "bias", None), softcap=softcap)


class _Gather(torch.autograd.Function):
    """Rows of a matrix, each at most once; an index one past the end is a row of zeros.

    The backward pass copies instead of adding: no atomics, the same bits every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """x[index], with what points past the end set to 0."""
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        inside = index < x.shape[0]
        return x.index_select(0, index.clamp(max=x.shape[0] - 1)) * inside[:, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Each row's gradient to where it came from."""
        (index,) = ctx.saved_tensors
        out = gradient.new_zeros((ctx.rows + 1, gradient.shape[1]))
        out.index_copy_(0, index, gradient)
        return out[:-1], None


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of x."""
    gathered: Tensor = _Gather.apply(x, index)  # type: ignore[no-untyped-call]
    return gathered


def _low(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _padded(weight: Tensor, low: torch.dtype | None) -> Tensor:
    """The weight in the product's type with rows up to `head_columns`."""
    missing = head_columns(weight.shape[0]) - weight.shape[0]
    if not missing:
        return weight
    return functional.pad(weight if low is None else weight.to(low), (0, 0, 0, missing))


def scores_of(kept: Tensor, head: Head) -> Tensor:
    """fp32 logits of some positions."""
    vocab = head.weight.shape[0]
    logits = functional.linear(kept, _padded(head.weight, _low(kept.device.type)))
    if logits.shape[-1] != vocab:
        logits = logits[..., :vocab]
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits.float()


def response_loss(
    kept: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """Summed loss of the kept positions, their logits all at once."""
    scores = scores_of(kept, Head(weight=weight, bias=bias, softcap=softcap))
    return functional.cross_entropy(scores, targets, reduction="sum", ignore_index=IGNORED)


def chunk_gradient(
    logits: Tensor, targets: Tensor, factor: Tensor, vocab: int, softcap: float | None
) -> Tensor:
    """Summed loss · factor of a chunk of raw logits (n, padded), which become its gradient by them."""
    scores = logits.float()
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
        slope = 1 - (scores / softcap) ** 2
    scores[:, vocab:] = -torch.inf  # columns of padding
    counts = targets != IGNORED
    safe = torch.where(counts, targets, 0)[:, None]
    wanted = scores.gather(1, safe)
    highest = scores.amax(dim=1, keepdim=True)
    scores = scores.sub_(highest).exp_()
    total = scores.sum(dim=1, keepdim=True)
    share = (counts * factor)[:, None]
    loss = ((total.log() + highest - wanted) * share).sum()
    gradient = scores.mul_(share / total).scatter_add_(1, safe, -share)
    if softcap is not None:
        gradient = gradient.mul_(slope)
    logits.copy_(gradient)
    return loss


def fused_chunk_gradient(
    logits: Tensor, targets: Tensor, factor: Tensor, vocab: int, softcap: float | None
) -> Tensor:
    """`chunk_gradient` for a compiler: twice over the logits, which holds nothing else of their size.

    Nothing is scattered: that would be done on fp32 in memory.
    """
    scores = logits.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    columns = torch.arange(logits.shape[1], device=logits.device)
    counts = targets != IGNORED
    safe = torch.where(counts, targets, 0)[:, None]
    share = (counts * factor)[:, None]
    real = torch.where(columns < vocab, scores, -torch.inf)
    highest = real.amax(dim=1, keepdim=True)
    powers = (real - highest).exp()
    total = powers.sum(dim=1, keepdim=True)
    loss = ((total.log() + highest - scores.gather(1, safe)) * share).sum()
    gradient = powers * (share / total) - torch.where(columns == safe, share, 0.0)
    if softcap is not None:
        gradient = gradient * (1 - (scores / softcap) ** 2)
    logits.copy_(gradient)
    return loss


class _Chunked(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass; the backward pass hands them on.

    `onto` is a gradient of the weight that this one is added to at once: then nothing is handed on, and the
    loss's own gradient has to be 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: Tensor,
        softcap: float | None,
        gradient_of: Callable[..., Tensor],
        onto: Tensor | None,
    ) -> Tensor:
        """The loss times `factor`; gradients are formed with it, so that fp16 does not underflow."""
        low = _low(kept.device.type) or kept.dtype
        rows, table = kept.to(low), weight.to(low)
        low_bias = None if bias is None else bias.to(low)
        vocab = weight.shape[0]
        loss = torch.zeros((), dtype=torch.float32, device=kept.device)
        d_rows, d_bias = torch.empty_like(rows), None
        d_table = torch.zeros_like(weight) if onto is None else onto
        if bias is not None:
            d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=kept.device)
        for start in range(0, rows.shape[0], CHUNK_ROWS):
            at = slice(start, start + CHUNK_ROWS)
            with torch.autocast(kept.device.type, enabled=False):
                logits = _logits(rows[at], table, low_bias)
                loss += gradient_of(logits, targets[at], factor, vocab, softcap)
                gradient = logits
                _add_products(d_rows[at], d_table, gradient, rows[at], table)
                if d_bias is not None:
                    d_bias += gradient[:, :vocab].float().sum(0)
                del logits, gradient  # before the next chunk's
        ctx.gradients = d_rows.to(kept.dtype), d_table if onto is None else None, d_bias
        ctx.bias_dtype = None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """The gradients formed before, times the loss's own; without a copy."""
        d_rows, d_weight, d_bias = ctx.gradients
        ctx.gradients = None
        d_rows *= gradient
        if d_weight is not None:
            d_weight *= gradient
        if d_bias is not None:
            d_bias = (d_bias * gradient).to(ctx.bias_dtype)
        return d_rows, d_weight, d_bias, None, None, None, None, None


def _parts(vocab: int) -> list[slice]:
    """The columns of `column_parts`."""
    stops = list(accumulate(column_parts(vocab)))
    return [slice(start, stop) for start, stop in pairwise([0, *stops])]


def _logits(rows: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """rows·tableᵀ + bias in rows of `head_columns`, of which those beyond the vocabulary hold anything."""
    logits = rows.new_empty((rows.shape[0], head_columns(table.shape[0])))
    for part in _parts(table.shape[0]):
        if bias is None:
            torch.mm(rows, table[part].t(), out=logits[:, part])
        else:
            torch.addmm(bias[part], rows, table[part].t(), out=logits[:, part])
    return logits


def _add_products(
    d_rows: Tensor, d_table: Tensor, gradient: Tensor, rows: Tensor, table: Tensor
) -> None:
    """d_rows = gradient·table, d_table += gradientᵀ·rows, rounded once per chunk."""
    first, *others = _parts(table.shape[0])
    torch.mm(gradient[:, first], table[first], out=d_rows)
    for part in others:
        d_rows.addmm_(gradient[:, part], table[part])
    for part in (first, *others):
        if d_table.dtype == gradient.dtype:
            d_table[part].addmm_(gradient[:, part].t(), rows)
        else:
            d_table[part] += gradient[:, part].t() @ rows


def chunked_loss(
    kept: Tensor,
    targets: Tensor,
    head: Head,
    factor: Tensor,
    gradient_of: Callable[..., Tensor] = chunk_gradient,
    onto: Tensor | None = None,
) -> Tensor:
    """Loss of the kept positions times `factor`; never more than CHUNK_ROWS positions' logits.

    The weight's gradient is added to `onto`, if there is one, before the backward pass, which then has to
    begin with a gradient of 1.
    """
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        kept, head.weight, head.bias, targets, factor, head.softcap, gradient_of, onto
    )
    return loss
