"""FLOPs of the operators that count: products and attention; PyTorch's own formulas for products."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from sftplan.step.ops.attention import attention_flops
from sftplan.step.ops.matmul import matmul_flops

if TYPE_CHECKING:
    from collections.abc import Callable

Args = tuple[Any, ...]
FORWARD, BACKWARD = 1, 2  # the backward's recomputed QKᵀ is not counted as work done


def flops_of(name: str, args: Args, documents: tuple[int, ...] = ()) -> int:
    """FLOPs of one call; `documents` are the lengths that varlen attention works on."""
    rule = PRODUCTS.get(name)
    if rule is not None:
        return rule(args)
    if name in ATTENTION:
        times, first = ATTENTION[name]
        query, key = args[first], args[first + 1]
        batch, heads, rows, size = query.shape
        return times * attention_flops(batch, heads, rows, key.shape[2], size)
    if name in VARLEN:
        times, first = VARLEN[name]
        _, heads, size = args[first].shape
        return times * sum(attention_flops(1, heads, n, n, size) for n in documents)
    return 0


def _product(a: Any, b: Any) -> int:
    """(…, m, k) times (…, k, n)."""
    return matmul_flops(prod(a.shape[:-1]), b.shape[-1], a.shape[-1])


PRODUCTS: dict[str, Callable[[Args], int]] = {
    "aten.mm.default": lambda args: _product(args[0], args[1]),
    "aten.mm.out": lambda args: _product(args[0], args[1]),
    "aten.bmm.default": lambda args: _product(args[0], args[1]),
    "aten.addmm.default": lambda args: _product(args[1], args[2]),
    "aten.addmm_.default": lambda args: _product(args[1], args[2]),
    "aten.baddbmm.default": lambda args: _product(args[1], args[2]),
    "aten._grouped_mm.default": lambda args: matmul_flops(
        args[0].shape[0], args[1].shape[-1], args[0].shape[-1]
    ),
}
ATTENTION = {
    "aten._scaled_dot_product_flash_attention.default": (FORWARD, 0),
    "aten._scaled_dot_product_cudnn_attention.default": (FORWARD, 0),
    "aten._scaled_dot_product_efficient_attention.default": (FORWARD, 0),
    "aten._scaled_dot_product_flash_attention_backward.default": (BACKWARD, 1),
    "aten._scaled_dot_product_cudnn_attention_backward.default": (BACKWARD, 1),
    "aten._scaled_dot_product_efficient_attention_backward.default": (BACKWARD, 1),
}
VARLEN = {
    "torch_attn._varlen_attn.default": (FORWARD, 0),
    "torch_attn._varlen_attn_backward.default": (BACKWARD, 1),
}
