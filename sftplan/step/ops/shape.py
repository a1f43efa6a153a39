"""Ops that move no data forward: views, splits, slices. Their gradients may have to be gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor


def view(tape: Tape, x: Tensor, *shape: int) -> Tensor:
    """The same memory in another shape; a gradient in another memory order is copied first."""
    node = tape.node("view", (x,), _view_backward)
    out = x.view(*shape)
    out.node = node
    return out


def _view_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    if gradient.strided:
        copy = tape.empty(gradient.shape, gradient.dtype)
        tape.pointwise("copy", [gradient, copy])
        gradient = copy
    return [gradient.view(*node.inputs[0][0])]


def transpose(tape: Tape, x: Tensor) -> Tensor:
    """(a, b, c, d) seen as (a, c, b, d)."""
    node = tape.node("transpose", (x,), _transpose_backward)
    out = _swapped(x)
    out.node = node
    return out


def _swapped(x: Tensor) -> Tensor:
    a, b, c, d = x.shape
    out = x.view(a, c, b, d)
    out.strided = not x.strided
    return out


def _transpose_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    return [_swapped(gradient)]


def heads_of(tape: Tape, x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H·D) as (B, H, T, D)."""
    batch, length, size = x.shape
    return transpose(tape, view(tape, x, batch, length, num_heads, size // num_heads))


def merge_heads(tape: Tape, x: Tensor) -> Tensor:
    """(B, H, T, D) as (B, T, H·D): copied where the memory is not in that order."""
    batch, num_heads, length, head_dim = x.shape
    x = transpose(tape, x)
    if x.strided:
        x = contiguous(tape, x)
    return view(tape, x, batch, length, num_heads * head_dim)


def contiguous(tape: Tape, x: Tensor) -> Tensor:
    """A copy in the order of the shape; its gradient passes as it is."""
    node = tape.node("clone", (x,), _clone_backward)
    out = tape.empty(x.shape, x.dtype)
    tape.pointwise("copy", [x, out])
    out.node = node
    return out


def _clone_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    return [gradients[0]]


def split(tape: Tape, x: Tensor, *sizes: int) -> list[Tensor]:
    """Views of parts of the last dimension; the gradients are concatenated."""
    node = tape.node("split", (x,), _split_backward)
    node.num_slots = len(sizes)
    parts = []
    for slot, size in enumerate(sizes):
        part = x.view(*x.shape[:-1], size)
        part.node, part.slot, part.strided = node, slot, x.strided
        parts.append(part)
    return parts


def _split_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    shape, dtype = node.inputs[0]
    out = tape.empty(shape, dtype)
    present = [g for g in gradients if g is not None]
    out.strided = present[0].strided
    tape.pointwise("cat", [*present, out])
    return [out]


def slice_last(tape: Tape, x: Tensor, size: int) -> Tensor:
    """A view of some of the last dimension; the gradient is zeros of full size, partly filled."""
    if x.node is None:
        return x.view(*x.shape[:-1], size)
    node = tape.node("slice", (x,), _slice_backward)
    out = x.view(*x.shape[:-1], size)
    out.strided = x.strided
    out.node = node
    return out


def _slice_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    out = tape.empty(node.inputs[0][0], gradient.dtype)
    tape.pointwise("zero", [out])
    tape.pointwise("copy", [gradient, gradient])
    return [out]


def cat_last(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Both, one after the other in the last dimension; gradients are views of the whole.

    Autocast brings y to the type of x, if that is the wider one.
    """
    if y.dtype is not x.dtype:
        y = tape.cast(y, x.dtype)
    node = tape.node("cat", (x, y), _cat_backward)
    out = tape.empty((*x.shape[:-1], x.shape[-1] + y.shape[-1]), x.dtype)
    tape.pointwise("cat", [x, y, out])
    out.node = node
    return out


def _cat_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    parts: list[Tensor | None] = []
    for shape, _ in node.inputs:
        part = gradient.view(*shape)
        part.strided = gradient.strided
        parts.append(part)
    return parts


def gather_rows(tape: Tape, x: Tensor, num_rows: int) -> Tensor:
    """Some rows of a matrix by index; the gradient is zeros with the rows added in."""
    indices = tape.empty((num_rows,), DType.INT64)
    node = tape.node("index", (x,), _gather_backward, (indices,))
    out = tape.empty((num_rows, *x.shape[1:]), x.dtype)
    tape.pointwise("index", [out, out])
    out.node = node
    return out


def _gather_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    out = tape.empty(node.inputs[0][0], gradient.dtype)
    tape.pointwise("zero", [out])
    tape.pointwise("index", [gradient, gradient])
    return [out]


def keep_rows(tape: Tape, x: Tensor, num_rows: int) -> Tensor:
    """Rows of a matrix by index, those past its end zero; train/loss.py, `gather`."""
    indices = tape.empty((num_rows,), DType.INT64)
    node = tape.node("index", (x,), _keep_backward, (indices,))
    selected = tape.empty((num_rows, *x.shape[1:]), x.dtype)
    tape.pointwise("index", [selected, selected])
    out = tape.empty(selected.shape, x.dtype)
    tape.pointwise("mul", [selected, out])
    out.node = node
    return out


def _keep_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    """Zeros and a row for what lies past the end, with the rows copied in."""
    gradient = gradients[0]
    assert gradient is not None
    rows, size = node.inputs[0][0]
    out = tape.empty((rows + 1, size), gradient.dtype)
    tape.pointwise("zero", [out])
    tape.pointwise("index", [gradient, gradient])
    return [out.view(rows, size)]


def pad_rows(tape: Tape, x: Tensor, num_rows: int) -> Tensor:
    """A copy of a matrix with rows of zeros added; the gradient is a copy of the first rows."""
    node = tape.node("pad", (x,), _pad_backward)
    out = tape.empty((num_rows, x.shape[1]), x.dtype)
    tape.pointwise("copy", [x, out])
    out.node = node
    return out


def _pad_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    out = tape.empty(node.inputs[0][0], gradient.dtype)
    tape.pointwise("copy", [out, out])
    return [out]
