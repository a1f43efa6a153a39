"""Births and deaths of storages while operators run on fake tensors, each with who made it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sftplan.step.chip import LT_WORKSPACE_BYTES
from sftplan.verify.trace.flops import PRODUCTS, flops_of
from sftplan.verify.trace.scratch import scratch_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.step.chip import Chip

aten = torch.ops.aten
FP32_BYTES = 4
FIRST = {aten.native_dropout.default: (1, 0)}  # the mask is taken first: Dropout.cu, dropout_cuda


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Events as the tape has them: a storage's number at its birth, its complement at its death.

    `sizes`, `kinds`, `makers` and `phases` hold bytes, category, operator and phase of each storage;
    `marks` the phase that begins at an event; `flops` those of products and attention, at the event
    that they come after.
    """

    def __init__(self, chip: Chip, documents: tuple[int, ...] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chip = chip
        self.documents = documents
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.makers: list[str] = []
        self.phases: list[str] = []
        self.marks: list[tuple[int, str]] = []
        self.flops: list[tuple[int, int]] = []  # event, FLOPs; without what is computed again
        self.num_ops = 0
        self.sums: list[tuple[int, int, int]] = []  # event, number of the sum, number it adds to
        self.phase = "build"
        self._live: dict[int, tuple[int, Any]] = {}
        self._workspaces: set[str] = set()

    def mark(self, phase: str) -> None:
        """A phase begins here."""
        self.marks.append((len(self.events), phase))
        self.phase = phase

    @property
    def backward(self) -> bool:
        """Whether the engine runs."""
        return self.phase == "backward"

    def relabel(self, tensors: Any, kind: str) -> None:
        """Say what storages are for."""
        for tensor in tensors:
            found = self._live.get(tensor.untyped_storage()._cdata)
            if found is not None:
                self.kinds[found[0]] = kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and write down what is new."""
        if func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        self.num_ops += 1
        name = str(func)
        if func is aten.addmm.default:
            self._touch("lt", LT_WORKSPACE_BYTES)
        scratch = scratch_of(name, args, self.chip)
        held = [self._born(size, name, "temporary") for size in scratch.before]
        out = func(*args, **(kwargs or {}))
        self._take(func, name, args, out)
        if name in PRODUCTS:
            self._touch("backward" if self.backward else "forward", self.chip.workspace_bytes)
        during = [self._born(size, name, "temporary") for size in scratch.during]
        self.events.extend(~number for number in (*during, *held))
        count = flops_of(name, args, self.documents)
        if count and not (self.backward and torch.is_grad_enabled()):
            self.flops.append((len(self.events), count))
        self.ran(func, args, out)
        return out

    def ran(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """For those who want to know more of an operator."""

    def _take(self, func: Any, name: str, args: tuple[Any, ...], out: Any) -> None:
        found = out if isinstance(out, (tuple, list)) else (out,)
        for position in FIRST.get(func, range(len(found))):
            tensor = found[position]
            if type(tensor) is not FakeTensor:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._live or not storage.nbytes():
                continue
            size = storage.nbytes()
            if func is aten.native_layer_norm.default and position:
                size = size // tensor.element_size() * FP32_BYTES  # CUDA keeps them in fp32
            number = self._adopt(storage, size, name)
            if func is aten.add.Tensor and self.backward and not torch.is_grad_enabled():
                self._note_sum(number, args[0])

    def _note_sum(self, number: int, first: Any) -> None:
        """The engine adds gradients in place where nothing else holds the first one."""
        if type(first) is FakeTensor and not first._is_view():
            known = self._live.get(first.untyped_storage()._cdata)
            if known is not None and self.sizes[known[0]] == self.sizes[number]:
                self.sums.append((len(self.events) - 1, number, known[0]))

    def _adopt(self, storage: Any, size: int, name: str) -> int:
        key = storage._cdata
        number = self._born(size, name, "temporary" if self.backward else "activations")
        self._live[key] = (number, weakref.ref(storage, self._death(key, number)))
        return number

    def _born(self, size: int, maker: str, kind: str) -> int:
        number = len(self.sizes)
        self.sizes.append(size)
        self.kinds.append(kind)
        self.makers.append(maker)
        self.phases.append(self.phase)
        self.events.append(number)
        return number

    def _death(self, key: int, number: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self._live.pop(key, None)
            self.events.append(~number)

        return died

    def _touch(self, owner: str, size: int) -> None:
        """Each thread's cuBLAS takes a workspace after its first result; cuBLASLt one of its own before."""
        if owner not in self._workspaces:
            self._workspaces.add(owner)
            self._born(size, "cublas", "workspace")
