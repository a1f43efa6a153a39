"""Element-wise ops: each reads its inputs and writes its result, bound by memory."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.step.autograd import Backward, Node
    from sftplan.step.tape import Tape


def promote(x: Tensor, y: Tensor) -> DType:
    """The type of a result of two: fp32 wins."""
    return DType.FP32 if DType.FP32 in (x.dtype, y.dtype) else x.dtype


def unary(
    tape: Tape,
    name: str,
    x: Tensor,
    *,
    keeps: Sequence[str] = (),
    backward: Backward | None = None,
) -> Tensor:
    """An op of one tensor that keeps its "input", its "output" or nothing."""
    node = tape.node(name, (x,), backward or _unary_backward, (x,) if "input" in keeps else ())
    out = tape.empty_like(x)
    tape.pointwise(name, [x, out])
    if "output" in keeps:
        tape.save(node, out)
    out.node = node
    return out


def _unary_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    out = tape.empty_like(gradient)
    tape.pointwise(node.name, [gradient, *saved, out])
    return [out]


def scale(tape: Tape, x: Tensor) -> Tensor:
    """x times a number."""
    return unary(tape, "mul", x)


def shift(tape: Tape, x: Tensor) -> Tensor:
    """X plus a number; the gradient passes as it is."""
    return unary(tape, "add", x, backward=_pass_on)


def _pass_on(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    return [gradients[0]]


def tanh(tape: Tape, x: Tensor) -> Tensor:
    """The hyperbolic tangent; keeps its result."""
    return unary(tape, "tanh", x, keeps=("output",))


def rsqrt(tape: Tape, x: Tensor) -> Tensor:
    """1/√x; keeps its result."""
    return unary(tape, "rsqrt", tape.high(x), keeps=("output",), backward=_rsqrt_backward)


def _rsqrt_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    """−½·g·r³: two intermediate results."""
    (gradient,), (result,) = gradients, saved
    assert gradient is not None
    cube = tape.empty(result.shape, result.dtype)
    scaled = tape.empty(gradient.shape, gradient.dtype)
    out = tape.empty(gradient.shape, gradient.dtype)
    tape.pointwise("rsqrt", [gradient, result, cube, scaled, out])
    return [out]


def silu(tape: Tape, x: Tensor) -> Tensor:
    """x·σ(x); keeps its input."""
    return unary(tape, "silu", x, keeps=("input",))


def gelu(tape: Tape, x: Tensor) -> Tensor:
    """GELU in one kernel, exact or with tanh; keeps its input."""
    return unary(tape, "gelu", x, keeps=("input",))


def relu(tape: Tape, x: Tensor) -> Tensor:
    """max(x, 0); keeps its result."""
    return unary(tape, "relu", x, keeps=("output",))


def neg(tape: Tape, x: Tensor) -> Tensor:
    """−x."""
    return unary(tape, "neg", x)


def power(tape: Tape, x: Tensor) -> Tensor:
    """x to a constant power; autocast runs it in fp32; keeps its input."""
    return unary(tape, "pow", tape.high(x), keeps=("input",), backward=_power_backward)


def _power_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    """g·(p·xᵖ⁻¹): two intermediate results live until the product stands."""
    (gradient,), (x,) = gradients, saved
    assert gradient is not None
    lower = tape.empty(x.shape, x.dtype)
    tape.pointwise("pow", [x, lower])
    slope = tape.empty(x.shape, x.dtype)
    tape.pointwise("mul", [lower, slope])
    out = tape.empty(x.shape, x.dtype)
    tape.pointwise("mul", [gradient, slope, out])
    del slope, lower
    return [out]


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """X + y; keeps nothing, both get the same gradient."""
    node = tape.node("add", (x, y), _add_backward)
    out = tape.empty_like(x if x.numel >= y.numel else y, promote(x, y))
    tape.pointwise("add", [x, y, out])
    out.node = node
    return out


def _add_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    return [
        None if edge is None else sum_to(tape, gradient.detach(), node.inputs[position][0])
        for position, edge in enumerate(node.edges)
    ]


def mul(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x·y; keeps of each what the other's gradient needs."""
    saved = [a for a, other in ((y, x), (x, y)) if other.node is not None]
    node = tape.node("mul", (x, y), _mul_backward, saved)
    out = tape.empty_like(x if x.numel >= y.numel else y, promote(x, y))
    tape.pointwise("mul", [x, y, out])
    out.node = node
    return out


def _mul_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    results: list[Tensor | None] = [None, None]
    wanted = [position for position, edge in enumerate(node.edges) if edge is not None]
    # The gradient of y comes first, as MulBackward0 has it.
    for position, factor in zip(reversed(wanted), reversed(saved), strict=True):
        product = tape.empty_like(gradient)
        tape.pointwise("mul", [gradient, factor, product])
        results[position] = product
        del product, factor
    saved.clear()
    for position, result in enumerate(results):
        if result is not None:
            results[position] = sum_to(tape, result, node.inputs[position][0])
    return results


def sum_to(tape: Tape, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient of a broadcast input: summed over what was repeated."""
    if gradient.shape == shape:
        return gradient
    if prod(shape) == gradient.numel:
        return gradient.view(*shape)
    out = tape.empty(shape, gradient.dtype)
    if shape[-1] == 1:  # along a row: one block sums it
        tape.pointwise("sum", [gradient, out])
    else:
        sum_rows(tape, gradient, out)
    return out


def sum_rows(tape: Tape, gradient: Tensor, out: Tensor) -> None:
    """Sum over all but the last dimensions, with the partial sums it holds while it runs."""
    columns = out.numel
    tape.scratch(reduction_bytes(gradient.numel // columns, columns, tape.chip.multiprocessors))
    tape.pointwise("sum", [gradient, out])


REDUCTION_WIDTH = 32 * 4  # columns of one block: a warp, four columns a thread
REDUCTION_HEIGHT = 4  # rows of one block: 512 threads / 4 columns / a warp
REDUCTION_MIN_ROWS = 256  # rows a thread must have for a column to be shared between blocks
REDUCTION_SHARED_ROWS = 16  # rows that are then left to it


def reduction_bytes(rows: int, columns: int, multiprocessors: int) -> int:
    """Partial sums that a sum over rows passes through memory, from 1,024 rows on.

    As many blocks share a column as fill the chip, each with at least 16 rows a thread
    (aten/native/cuda/Reduce.cuh, setReduceConfig; sizes seen in an H200's allocator traces).

    >>> [reduction_bytes(rows, 1280, 132) for rows in (512, 1024, 8192)]
    [0, 10485760, 83886080]
    >>> reduction_bytes(8192, 5120, 132), reduction_bytes(8192, 3840, 132)
    (138936320, 139591680)
    """
    rows_per_thread = -(-rows // REDUCTION_HEIGHT)
    if rows_per_thread < REDUCTION_MIN_ROWS:
        return 0
    blocks_per_multiprocessor = 2048 // (REDUCTION_WIDTH // 4 * REDUCTION_HEIGHT)
    blocks = multiprocessors * blocks_per_multiprocessor
    filling = -(-blocks // -(-columns // REDUCTION_WIDTH))
    sharing = max(
        min(filling, -(-rows_per_thread // REDUCTION_SHARED_ROWS)),
        -(-rows_per_thread // REDUCTION_MIN_ROWS),
    )
    return 4 * columns * REDUCTION_WIDTH * sharing if sharing > 1 else 0


def mean_last(tape: Tape, x: Tensor) -> Tensor:
    """Mean over the last dimension; the gradient is spread to full size."""
    node = tape.node("mean", (x,), _mean_backward)
    out = tape.empty((*x.shape[:-1], 1), x.dtype)
    tape.pointwise("mean", [x, out])
    out.node = node
    return out


def _mean_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    out = tape.empty(node.inputs[0][0], gradient.dtype)
    tape.pointwise("div", [gradient, out])
    return [out]


def dropout(tape: Tape, x: Tensor, probability: float, *, hashed: bool = False) -> Tensor:
    """Dropout; keeps a mask of one byte an element, unless the mask is `hashed` (train/dropout.py)."""
    if not probability:
        return x
    node = tape.node("dropout", (x,), _unary_backward)
    masks = [] if hashed else [tape.empty(x.shape, DType.BYTE)]
    out = tape.empty_like(x)
    tape.pointwise("dropout", [x, *masks, out])
    for mask in masks:
        tape.save(node, mask)
    out.node = node
    return out


def gelu_new(tape: Tape, x: Tensor) -> Tensor:
    """½x(1 + tanh(√(2/π)(x + 0.044715x³))), op by op as transformers' NewGELUActivation."""
    return mul(
        tape,
        scale(tape, x),
        shift(tape, tanh(tape, scale(tape, add(tape, x, scale(tape, power(tape, x)))))),
    )


def softmax(tape: Tape, x: Tensor) -> Tensor:
    """Softmax over the last dimension, in fp32 under autocast; keeps its result."""
    return unary(tape, "softmax", tape.high(x), keeps=("output",))


def sigmoid(tape: Tape, x: Tensor) -> Tensor:
    """1/(1 + e⁻ˣ); keeps its result."""
    return unary(tape, "sigmoid", x, keeps=("output",))


def sum_groups(tape: Tape, x: Tensor, size: int) -> Tensor:
    """Sums of `size` consecutive rows; the gradient is a repeated view."""
    node = tape.node("sum", (x,), _sum_groups_backward)
    out = tape.empty((x.shape[0] // size, *x.shape[1:]), x.dtype)
    tape.pointwise("sum", [x, out])
    out.node = node
    return out


def _sum_groups_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    return [Tensor(node.inputs[0][0], gradient.dtype, gradient.storage)]
