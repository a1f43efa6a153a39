"""What kernels hold only while they run: no operator returns it, the allocator sees it.

One function per operator, of the operator's arguments; the formulas are the tape's own, read from the
kernels' sources. `before` is taken ahead of the result and let go after it, `during` after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from sftplan.step.ops.attention import CUDNN_EXTRA_BYTES, FLASH_BLOCK_ROWS
from sftplan.step.ops.lookup import EMBEDDING_ROWS_PER_SEGMENT, EMBEDDING_SORT_TOKENS
from sftplan.step.ops.pointwise import reduction_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.step.chip import Chip

Args = tuple[Any, ...]
aten = torch.ops.aten
FP32_BYTES, INT64_BYTES = 4, 8


@dataclass(frozen=True, slots=True)
class Scratch:
    """Bytes of each block."""

    before: tuple[int, ...] = ()
    during: tuple[int, ...] = ()


NONE = Scratch()


def scratch_of(name: str, args: Args, chip: Chip) -> Scratch:
    """Scratch of one call of an operator, `aten.mm.default` say."""
    rule = RULES.get(name)
    return NONE if rule is None else rule(args, chip)


def _embedding_backward(args: Args, chip: Chip) -> Scratch:
    """Sorted indices, then fp32 sums of parts of each segment (EmbeddingBackwardKernel.cu)."""
    gradient, indices, rows = args[0], args[1], args[2]
    tokens = indices.numel()
    if tokens <= EMBEDDING_SORT_TOKENS:
        return NONE
    partial = tokens // EMBEDDING_ROWS_PER_SEGMENT + min(tokens, rows)
    return Scratch(
        before=(INT64_BYTES * tokens,) * 4, during=(FP32_BYTES * partial * gradient.shape[-1],)
    )


def _sum_over_rows(args: Args, chip: Chip) -> Scratch:
    """Partial sums of a sum over the leading dimensions (Reduce.cuh)."""
    x, dims = args[0], sorted(d % args[0].dim() for d in args[1])
    if dims != list(range(len(dims))) or len(dims) == x.dim() or not x.is_contiguous():
        return NONE
    columns = prod(x.shape[len(dims) :])
    size = reduction_bytes(x.numel() // columns, columns, chip.multiprocessors)
    return Scratch(during=(size,) if size else ())


def _flash_backward(args: Args, chip: Chip) -> Scratch:
    """Σ(dO∘O), an fp32 accumulator of dQ, and ungrouped dK and dV (flash_api.cpp, mha_bwd)."""
    query, key = args[1], args[2]
    batch, heads, length, size = query.shape
    rounded = -(-length // FLASH_BLOCK_ROWS) * FLASH_BLOCK_ROWS
    rows = FP32_BYTES * batch * rounded * heads
    return Scratch(during=(rows, rows * _head_columns(size), *_ungrouped(query, key)))


def _cudnn_backward(args: Args, chip: Chip) -> Scratch:
    """cuDNN's workspace, as an H200's allocator traces show it."""
    query, key = args[1], args[2]
    batch, heads, length, size = query.shape
    workspace = FP32_BYTES * batch * heads * length * (size + 1) + CUDNN_EXTRA_BYTES
    return Scratch(during=(workspace + sum(_ungrouped(query, key)),))


def _efficient_backward(args: Args, chip: Chip) -> Scratch:
    """Σ(dO∘O) (attention_backward.cu)."""
    batch, heads, length = args[1].shape[:3]
    return Scratch(during=(FP32_BYTES * batch * heads * length,))


def _varlen_backward(args: Args, chip: Chip) -> Scratch:
    """As flash attention's, with every document rounded up."""
    query, key, documents = args[1], args[2], args[6].numel() - 1
    length, heads, size = query.shape
    rows = FP32_BYTES * heads * (length + documents * FLASH_BLOCK_ROWS)
    grouped = query.numel() * query.element_size() if key.shape[1] != heads else 0
    return Scratch(during=(rows, rows * _head_columns(size), *((grouped,) * 2 if grouped else ())))


def _head_columns(size: int) -> int:
    multiple = 32 if size <= 128 else 64
    return -(-size // multiple) * multiple


def _ungrouped(query: torch.Tensor, key: torch.Tensor) -> tuple[int, ...]:
    """dK and dV of every query head, where keys are shared (B, H, T, D)."""
    if key.shape[1] == query.shape[1]:
        return ()
    return (query.numel() * query.element_size(),) * 2


RULES: dict[str, Callable[[Args, Chip], Scratch]] = {
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.sum.dim_IntList": _sum_over_rows,
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_backward,
    "aten._scaled_dot_product_cudnn_attention_backward.default": _cudnn_backward,
    "aten._scaled_dot_product_efficient_attention_backward.default": _efficient_backward,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
}
