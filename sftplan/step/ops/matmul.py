"""Matrix products."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sftplan.step.ops.pointwise import sum_rows

if TYPE_CHECKING:
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor

ALIGNMENT_ELEMENTS = 8  # 16 bytes of a two-byte type: other leading dimensions have no fast kernel


def matmul_flops(m: int, n: int, k: int) -> int:
    """FLOPs of (m, k) times (k, n): a multiplication and an addition count as two.

    2·m·n·k

    >>> matmul_flops(1024, 50257, 1280)  # GPT-2 Large's LM head over one row of 1024 tokens
    131745710080
    """
    return 2 * m * n * k


def matmul(tape: Tape, kind: str, m: int, n: int, k: int, out: Tensor) -> None:
    """Record one product (m, k) times (k, n) in the type of its result."""
    tape.touch_workspace()
    moved = (m * k + k * n + m * n) * out.dtype.size
    tape.work(kind, out.dtype, matmul_flops(m, n, k), moved, m, n, k)


def linear(
    tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, bias_last: bool = False
) -> Tensor:
    """x·Wᵀ + b over the last dimension; `weight` has n·k elements in either order.

    Saves x and W. With a bias it is one addmm, without it an mm.
    """
    if bias is not None and not bias_last:  # F.linear brings the bias to the low type first
        bias = tape.low(bias)
    weight = tape.low(weight)
    x = tape.low(x)
    if bias is not None and bias_last:  # torch.addmm, GPT-2's Conv1D, last
        bias = tape.low(bias)
    k = x.shape[-1]
    n = weight.numel // k
    inputs = (x, weight) if bias is None else (x, weight, bias)
    node = tape.node("linear", inputs, _linear_backward, (x, weight))
    if bias is not None:
        tape.touch_lt_workspace()
    out = tape.recall()
    if out is None:
        out = tape.empty((*x.shape[:-1], n), x.dtype)
        matmul(tape, "linear", prod(x.shape[:-1]), n, k, out)
        tape.keep(out)
    out.node = node
    return out


def _linear_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    (gradient,), (x, weight) = gradients, saved
    assert gradient is not None
    m, k = prod(x.shape[:-1]), x.shape[-1]
    n = weight.numel // k
    results: list[Tensor | None] = [None] * len(node.edges)
    has_bias = len(results) > 2
    for position in (0, 1) if has_bias else (1, 0):  # mm forms the weight's gradient first
        if node.edges[position] is None:
            continue
        like, rows, columns, inner = ((x, m, k, n), (weight, n, k, m))[position]
        out = tape.empty(like.shape, like.dtype)
        matmul(tape, "linear", rows, columns, inner, out)
        # Both come out of a view of the product: a transposed one of the weight's, one of the rows.
        out.viewed = len(x.shape) > 2 if position == 0 else not has_bias
        results[position] = out
        del out
    del x, weight, like
    saved.reverse()  # x goes first
    saved.clear()  # the sum comes after the products, when what was computed again is gone
    if has_bias and node.edges[2] is not None:
        summed = tape.empty((n,), gradient.dtype)
        sum_rows(tape, gradient, summed)
        results[2] = summed
    return results


def bmm(tape: Tape, a: Tensor, b: Tensor, rows: int, columns: int, inner: int) -> Tensor:
    """Batched product (batch·rows, inner) times (inner, columns): attention's two T×T products.

    Saves both inputs; each gradient is one more product.
    """
    a, b = tape.low(a), tape.low(b)
    batch = a.numel // (rows * inner)
    node = tape.node("bmm", (a, b), _bmm_backward, (a, b))
    out = tape.recall()
    if out is None:
        out = tape.empty((*a.shape[:-2], rows, columns), a.dtype)
        _batched(tape, batch, rows, columns, inner, out)
        tape.keep(out)
    node.extra = (batch, rows, columns, inner)
    out.node = node
    return out


def _batched(tape: Tape, batch: int, m: int, n: int, k: int, out: Tensor) -> None:
    tape.touch_workspace()
    moved = batch * (m * k + k * n + m * n) * out.dtype.size
    tape.work("bmm", out.dtype, batch * matmul_flops(m, n, k), moved, batch, m, n, k)


def _bmm_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    a, b = saved
    batch, rows, columns, inner = node.extra
    results: list[Tensor | None] = [None, None]
    for position, (like, m, n, k) in enumerate(
        ((a, rows, inner, columns), (b, inner, columns, rows))
    ):
        if node.edges[position] is not None:
            out = tape.empty(like.shape, like.dtype)
            _batched(tape, batch, m, n, k, out)
            results[position] = out
            del out
    return results


def grouped_linear(tape: Tape, x: Tensor, weight: Tensor, num_out: int) -> Tensor:
    """Rows times the matrix of their expert: x (S, k), weight (experts, n, k) in one grouped product."""
    weight = tape.low(weight)
    x = tape.low(x)
    node = tape.node("grouped_mm", (x, weight), _grouped_backward, (x, weight))
    out = tape.recall()
    if out is None:
        out = tape.empty((x.shape[0], num_out), x.dtype)
        matmul(tape, "grouped", x.shape[0], num_out, x.shape[1], out)
        tape.keep(out)
    out.node = node
    return out


def _grouped_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    (gradient,), (x, weight) = gradients, saved
    assert gradient is not None
    rows, k, n = x.shape[0], x.shape[1], gradient.shape[1]
    out = tape.empty(x.shape, x.dtype)
    matmul(tape, "grouped", rows, k, n, out)
    weight_gradient = tape.empty(weight.shape, weight.dtype)
    matmul(tape, "grouped", n, k, rows, weight_gradient)
    return [out, weight_gradient]
