"""What each operator's kernels have to do, in the words of the tape: kind, type, FLOPs, bytes, shape.

Kinds are those whose rates `cost.kernels` knows; an operator without a kind of its own moves its operands
at the rate of streaming.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from sftplan.step.ops.attention import varlen_shape
from sftplan.step.work import BROADCAST, MIXED, STRIDED
from sftplan.verify.trace.flops import ATTENTION, PRODUCTS, VARLEN, flops_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Kernels = list[tuple[str, list[torch.Tensor]]]

Work = tuple[str, str, int, int, tuple[int, ...]]  # as `step.work.Work`, the type by its label
Tensor = torch.Tensor

LABELS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "int64",
    torch.int32: "int32",
}  # fmt: skip
KINDS = {  # operators that the tape calls otherwise
    "_softmax": "softmax", "_softmax_backward_data": "softmax", "_log_softmax": "log_softmax",
    "_log_softmax_backward_data": "log_softmax_backward", "native_layer_norm": "layer_norm",
    "native_dropout": "dropout", "native_dropout_backward": "dropout", "_to_copy": "cast",
    "clone": "copy", "copy_": "copy", "zeros": "zero", "zero_": "zero", "new_zeros": "zero",
    "zeros_like": "zero", "full": "zero", "fill_": "zero", "index_select": "index",
    "gather": "index", "index_copy_": "index", "index_put_": "index", "scatter": "index",
    "constant_pad_nd": "copy",
}  # fmt: skip
WITHOUT_KERNEL = frozenset(
    ("_unsafe_view", "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty",
     "new_empty_strided", "lift_fresh", "resize_", "set_", "_local_scalar_dense", "split_with_sizes")
)  # fmt: skip
GATHERED = frozenset(("index", "embedding"))  # read as much as they write, wherever it lies
BATCHED = frozenset(("aten.bmm.default", "aten.baddbmm.default"))
# Several kernels, or fewer operands read than there are: what each moves, of (operands, results).
SPECIAL: dict[str, Callable[[list[Tensor], list[Tensor]], Kernels]] = {
    "native_layer_norm": lambda ins, outs: [("layer_norm", [ins[0], outs[0]])],
    "native_layer_norm_backward": lambda ins, outs: [
        ("layer_norm", [ins[0], ins[1], outs[0]]),
        ("layer_norm_weight", [ins[0], ins[1], outs[-1]]),
    ],
    "embedding_dense_backward": lambda ins, outs: [("zero", outs), ("embedding", [ins[0]] * 2)],
    "slice_backward": lambda ins, outs: [("zero", outs), ("copy", [ins[0]] * 2)],
    "select_backward": lambda ins, outs: [("zero", outs), ("copy", [ins[0]] * 2)],
    "nll_loss_forward": lambda ins, outs: [("index", [ins[1]] * 2)],  # one score of each row
    "nll_loss_backward": lambda ins, outs: [("zero", outs)],
}


def works_of(
    func: Any, args: Sequence[Any], out: Any, documents: tuple[int, ...] = ()
) -> list[Work]:
    """The kernels of one call."""
    name = str(func)
    base = name.split(".")[1]
    if func.is_view or base in WITHOUT_KERNEL:
        return []
    outs = list(_tensors(out))
    if not outs:
        return []
    if name in PRODUCTS:
        return [_product(name, args, outs[0])]
    if name in ATTENTION or name in VARLEN:
        return [_attention(name, args, outs, documents)]
    ins = list(_tensors(args))
    if base in SPECIAL:
        return [_moved(kind, moved) for kind, moved in SPECIAL[base](ins, outs)]
    kind = KINDS.get(base, base.rstrip("_") if not base.endswith("_backward") else base[:-9])
    if kind in GATHERED:
        return [_moved(kind, outs * 2)]
    return [_moved(kind, outs if kind == "zero" else [*ins, *reversed(outs)])]


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _tensors(each)


def _product(name: str, args: Sequence[Any], out: Tensor) -> Work:
    first = 0 if name in ("aten.mm.default", "aten.mm.out", "aten.bmm.default") else 1
    if name == "aten._grouped_mm.default":
        first = 0
    a, b = args[first], args[first + 1]
    k, n = a.shape[-1], b.shape[-1]
    rows = prod(a.shape[:-1])
    batch = a.shape[0] if name in BATCHED else 1
    m = rows // batch
    moved = batch * (m * k + k * n + m * n) * out.element_size()
    kind = "grouped" if "grouped" in name else "bmm" if name in BATCHED else "linear"
    shape = (batch, m, n, k) if kind == "bmm" else (m, n, k)
    return kind, _label(out), flops_of(name, tuple(args)), moved, shape


def _attention(
    name: str, args: Sequence[Any], outs: Sequence[Tensor], documents: tuple[int, ...]
) -> Work:
    """Moved: queries, keys, values and results, their gradients too in the backward pass."""
    first = (ATTENTION.get(name) or VARLEN[name])[1]
    query, key = args[first], args[first + 1]
    kind = "efficient" if "efficient" in name else "flash"
    shape: tuple[int, ...]
    if name in VARLEN:
        length, heads, size = query.shape
        kind, shape = "varlen", varlen_shape(heads, size, documents, max(documents))
    else:
        batch, heads, length, size = query.shape
        shape = (batch * heads, length, size, key.shape[2])
    moved = (2 * query.numel() + 2 * key.numel()) * query.element_size()
    if "backward" in name:
        kind, moved = f"{kind}_backward", 2 * moved
    return kind, _label(query), flops_of(name, tuple(args), documents), moved, shape


def _moved(kind: str, moved: Sequence[Tensor]) -> Work:
    """A kernel bound by memory that reads or writes each of these once."""
    last = moved[-1]
    access: tuple[int, ...] = ()
    for x in moved:
        if x.numel() <= 1:  # a number
            continue
        if _distinct(x) != x.numel() or x.shape != last.shape:
            access = access if access == STRIDED else BROADCAST
        elif not x.is_contiguous():
            access = STRIDED
        elif x.dtype is not last.dtype and not access:
            access = MIXED
    return kind, _label(last), 0, sum(_distinct(x) * x.element_size() for x in moved), access


def _distinct(x: Tensor) -> int:
    """Elements that lie in memory: expanded dimensions repeat theirs."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def _label(x: Tensor) -> str:
    return LABELS.get(x.dtype, "byte" if x.element_size() == 1 else "int64")
