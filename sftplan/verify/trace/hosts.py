"""The operations that Python dispatches in a forward pass, by the names whose cost `cost.dispatch` knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = {
    "linear": "linear", "addmm": "linear", "layer_norm": "layer_norm", "rms_norm": "layer_norm",
    "native_dropout": "dropout", "embedding": "embedding", "cross_entropy": "log_softmax",
    "scaled_dot_product_attention": "attention", "varlen_attn": "varlen",
    "matmul": "bmm", "bmm": "bmm", "baddbmm": "bmm", "__matmul__": "bmm", "einsum": "bmm",
    "view": "view", "reshape": "view", "unsqueeze": "view", "squeeze": "view", "flatten": "view",
    "unflatten": "view", "expand": "view", "view_as": "view", "expand_as": "view",
    "transpose": "transpose", "permute": "transpose", "t": "transpose", "swapaxes": "transpose",
    "split": "split", "chunk": "split", "unbind": "split", "tensor_split": "split",
    "__getitem__": "slice", "narrow": "slice", "select": "slice",
    "contiguous": "clone", "clone": "clone", "cat": "cat", "stack": "cat",
    "__neg__": "neg", "__pow__": "pow", "softmax": "softmax", "_softmax": "softmax",
}  # fmt: skip
OPERATORS = {  # with r and i before them too
    "add": "add", "sub": "add", "mul": "mul", "truediv": "mul", "div": "mul",
}  # fmt: skip
# Questions, and changes of type: the operators below autograd tell which of them do anything.
SILENT = frozenset(("to", "float", "type", "type_as", "half", "bfloat16", "detach", "size", "dim"))


class HostCounter(TorchFunctionMode):
    """Tells `count` the name of every operation, and whether the backward pass has a node for it."""

    def __init__(self, count: Callable[[str, bool], None]) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of PyTorch and count it; what a backward pass computes again too."""
        if func is torch.Tensor.backward:
            with self:  # every public entry to the engine would come by here again
                start = (torch.ones_like(args[0]),)
                _engine_run_backward(
                    (args[0],), start, False, False, (), allow_unreachable=True,
                    accumulate_grad=True,
                )  # fmt: skip
            return None
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, torch.Tensor) and name not in SILENT and name != "__get__":
            nothing_done = name == "contiguous" and first is args[0]
            if not nothing_done:
                self.count(host_name(name), first.requires_grad)
        return out


def host_name(name: str) -> str:
    """The name of an operation in `cost.dispatch`; those it has not measured keep theirs.

    >>> host_name("__radd__"), host_name("mul_"), host_name("rsqrt"), host_name("permute")
    ('add', 'mul', 'rsqrt', 'transpose')
    """
    if name in NAMES:
        return NAMES[name]
    if "dot_product" in name:
        return "attention"
    bare = name.strip("_")
    for start in ("", "r", "i"):
        if bare.startswith(start) and bare.removeprefix(start) in OPERATORS:
            return OPERATORS[bare.removeprefix(start)]
    return NAMES.get(bare, bare)
