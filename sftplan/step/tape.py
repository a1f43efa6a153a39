"""The record of one training step: which storage lives when, which work is done where."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

from sftplan.step.autograd import Frame, Handle, Node, StopRecomputation, run_backward
from sftplan.step.chip import HOPPER, LT_WORKSPACE_BYTES
from sftplan.step.leaves import LEAF_SEQUENCE, accumulate
from sftplan.step.tensor import DType, Storage, Tensor
from sftplan.step.work import BROADCAST, MIXED, STRIDED, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sftplan.step.autograd import Backward
    from sftplan.step.chip import Chip


ASIDE = (
    "@"  # behind the kind of a storage: the stream that takes it, where that is not the step's own
)


TUNING = "tuning"  # category of what only the first step takes: reserved, but in no step's peak


class Tape:
    """Events of one rank: storage numbers as they are born, their complements as they die.

    `sizes`, `kinds` and `owners` hold bytes, category and layer of each storage; `works` the kernels
    of each segment, `hosts` the operations that the host dispatches in it; `marks` where each begins.
    """

    def __init__(self, autocast: DType | None = None, chip: Chip = HOPPER) -> None:
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.owners: list[int | None] = []
        self.owner: int | None = None
        self.weight_bytes: Counter[int | None] = Counter()  # by the layer that owns them
        self.marks: list[tuple[int, str]] = []
        self.works: list[tuple[str, Counter[Work]]] = []
        self.hosts: list[Counter[str]] = []
        self.kind = "activations"
        self.autocast_dtype = autocast
        self.autocast = False
        self._casts: dict[Tensor, Tensor] = {}
        self._sequence = 0
        self.chip = chip
        self._workspaces: dict[bool, Storage] = {}
        self._lt_workspace: Storage | None = None
        self.tuned = False  # a step went before, in which inductor tried its kernels
        self._in_backward = False
        self.on_gradient: Callable[[Tensor], bool] | None = None  # whether it is taken over
        self._frame: Frame | None = None
        self._recomputing: Frame | None = None
        self.mark("start")

    def mark(self, label: str, layer: int | None = None) -> None:
        """Begin a segment: a phase, or one layer of it, which then owns what is born."""
        self.owner = layer
        label = label if layer is None else f"{label} {layer}"
        self.marks.append((len(self.events), label))
        self.works.append((label, Counter()))
        self.hosts.append(Counter())

    def enter(self, layer: int | None) -> None:
        """What is born from here on belongs to that layer."""
        self.owner = layer

    # -- memory -------------------------------------------------------------------------------------
    def empty(self, shape: tuple[int, ...], dtype: DType, kind: str | None = None) -> Tensor:
        """A new storage of that shape."""
        return Tensor(shape, dtype, self.storage(prod(shape) * dtype.size, kind))

    def empty_like(self, x: Tensor, dtype: DType | None = None) -> Tensor:
        """A new storage of a tensor's shape and memory order."""
        out = self.empty(x.shape, dtype or x.dtype)
        out.strided = x.strided
        return out

    def storage(self, num_bytes: int, kind: str | None = None) -> Storage:
        """A new storage of that many bytes; a kind may have the stream that takes it behind ASIDE."""
        index = len(self.sizes)
        self.sizes.append(num_bytes)
        self.kinds.append(kind or self.kind)
        self.owners.append(self.owner)
        return Storage(self.events, index)

    def scratch(self, *num_bytes: int, stream: str = "") -> None:
        """Memory that a kernel holds only while it runs."""
        held = [self.storage(size, f"temporary{stream}") for size in num_bytes if size]
        del held

    def parameter(self, shape: tuple[int, ...], dtype: DType, *, on_host: bool = False) -> Tensor:
        """A weight that is trained; built on the host it takes nothing here."""
        weight = self.empty(shape if not on_host else (0,), dtype, "weights")
        weight.shape = shape
        self.weight_bytes[self.owner] += weight.nbytes
        weight.is_leaf = True
        weight.node = Node("AccumulateGrad", LEAF_SEQUENCE, [], accumulate, [])
        weight.node.extra = None
        return weight

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Put a storage in another category, from its birth on."""
        self.kinds[tensor.storage.index] = kind

    # -- graph --------------------------------------------------------------------------------------
    def node(
        self, name: str, inputs: Sequence[Tensor], backward: Backward, saved: Sequence[Tensor] = ()
    ) -> Node:
        """The backward node of an op; `saved` are the inputs it keeps, before the op runs."""
        self.host(name)
        edges = [None if x.node is None else (x.node, x.slot) for x in inputs]
        self._sequence += 1
        node = Node(name, self._sequence, edges, backward, [(x.shape, x.dtype) for x in inputs])
        for tensor in saved:
            self.save(node, tensor)
        return node

    def silent_node(self, inputs: Sequence[Tensor], backward: Backward) -> Node:
        """A node that stands for no operation."""
        edges = [None if x.node is None else (x.node, x.slot) for x in inputs]
        self._sequence += 1
        return Node("", self._sequence, edges, backward, [(x.shape, x.dtype) for x in inputs])

    def save(self, node: Node, tensor: Tensor) -> None:
        """Keep a tensor for the backward pass, or only its number inside a checkpointed call."""
        if not tensor.is_leaf:  # a weight is kept as itself: its memory may be gathered anew
            tensor = tensor.detach()
        if self._recomputing is not None:
            frame = self._recomputing
            assert frame.recomputed is not None
            frame.recomputed[len(frame.recomputed)] = tensor
            if len(frame.recomputed) == frame.num_saved:
                raise StopRecomputation
        elif self._frame is not None:
            node.saved.append(Handle(self._frame, self._frame.num_saved))
            self._frame.num_saved += 1
        else:
            node.saved.append(tensor)

    def unpack(self, item: Tensor | Handle) -> Tensor:
        """A saved tensor, computed again if its call was checkpointed."""
        if isinstance(item, Tensor):
            return item
        if item.frame.recomputed is None:
            self._recompute(item.frame)
        assert item.frame.recomputed is not None
        return item.frame.recomputed.pop(item.number)

    def checkpoint(
        self, function: Callable[..., Tensor], x: Tensor, *, selective: bool = False
    ) -> Tensor:
        """Non-reentrant checkpointing of one call (torch.utils.checkpoint).

        `selective` keeps what products and attention give and computes only the rest again
        (create_selective_checkpoint_contexts).
        """
        self.host("checkpoint")
        if selective:
            self.host("selective")
        self._frame = Frame(function, (x.detach(),), selective=selective)
        try:
            return function(x)
        finally:
            self._frame = None

    def recall(self) -> Tensor | None:
        """While recomputing selectively: the next result that was kept."""
        frame = self._recomputing
        if frame is None or frame.kept is None:
            return None
        return frame.kept.pop(0).detach()

    def keep(self, result: Tensor) -> None:
        """Keep a result for the recomputation, if the call is checkpointed selectively."""
        if self._frame is not None and self._frame.kept is not None and self._recomputing is None:
            self._frame.kept.append(result.detach())

    def _recompute(self, frame: Frame) -> None:
        frame.recomputed = {}
        if frame.kept is not None:
            self.host("selective")
        outer, self._recomputing = self._recomputing, frame
        kind, self.kind = self.kind, "activations"
        autocast, self.autocast = self.autocast, self.autocast_dtype is not None
        try:
            inputs = [x.detach() for x in frame.inputs]
            for x in inputs:
                x.node = Node("detached", 0, [], _nothing, [])
            frame.function(*inputs)
        except StopRecomputation:
            pass
        finally:
            self._recomputing, self.kind, self.autocast = outer, kind, autocast
            self._casts.clear()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar for all parameters."""
        assert loss.node is not None
        self._in_backward = True
        run_backward(self, loss.node, self.empty((), loss.dtype, "temporary"))
        self._in_backward = False

    # -- types --------------------------------------------------------------------------------------
    def low(self, x: Tensor) -> Tensor:
        """Under autocast: the tensor in the low type, a leaf's copy cached until autocast ends."""
        target = self.autocast_dtype
        if not self.autocast or target is None or x.dtype is target or x.dtype is not DType.FP32:
            return x
        if not x.is_leaf:
            return self.cast(x, target)
        if x not in self._casts:
            self._casts[x] = self.cast(x, target)
        return self._casts[x]

    def high(self, x: Tensor) -> Tensor:
        """Under autocast: the tensor in fp32, for the ops that CUDA's autocast runs there."""
        return self.cast(x, DType.FP32) if self.autocast else x

    def leave_autocast(self) -> None:
        """End the autocast region and forget the weights' copies."""
        self.autocast = False
        self._casts.clear()

    def cast(self, x: Tensor, dtype: DType) -> Tensor:
        """A copy in another type; the tensor itself if it has it."""
        if x.dtype is dtype:
            return x
        node = self.node("cast", (x,), _cast_backward)
        out = self.empty_like(x, dtype)
        self.pointwise("cast", [x, out])
        out.node = None if x.node is None else node
        return out

    def cast_gradient(self, gradient: Tensor, dtype: DType) -> Tensor:
        """A gradient brought to its input's type."""
        out = self.empty_like(gradient, dtype)
        self.pointwise("cast", [gradient, out])
        return out

    # -- work ---------------------------------------------------------------------------------------
    def pointwise(self, kind: str, moved: Sequence[Tensor], *, times: int = 1) -> None:
        """A memory-bound kernel that reads or writes each of these once, so many times over."""
        num_bytes = 0
        dtype, shape = moved[-1].dtype, moved[-1].shape
        access: tuple[int, ...] = ()
        for x in moved:
            num_bytes += x.nbytes
            if x.strided:
                access = STRIDED
            elif x.shape != shape and access != STRIDED:
                access = BROADCAST
            elif x.dtype is not dtype and not access:
                access = MIXED
        self.works[-1][1][Work(kind, dtype, 0, num_bytes, access)] += times

    def work(self, kind: str, dtype: DType, flops: int, num_bytes: int, *shape: int) -> None:
        """A kernel with arithmetic that counts."""
        self.works[-1][1][Work(kind, dtype, flops, num_bytes, shape)] += 1

    def touch_workspace(self, *, backward: bool = False) -> None:
        """cuBLAS takes a workspace at its first product in each thread, and keeps it."""
        thread = backward or self._in_backward
        if thread not in self._workspaces:
            self._workspaces[thread] = self.storage(self.chip.workspace_bytes, "workspace")

    def touch_lt_workspace(self) -> None:
        """CuBLASLt takes one of its own at the first product with a bias."""
        if self._lt_workspace is None:
            self._lt_workspace = self.storage(LT_WORKSPACE_BYTES, "workspace")

    def tune(self) -> None:
        """Once: inductor tries a graph's kernels beside a buffer of the L2 cache's size (its benchmarking.py)."""
        if not self.tuned:
            self.tuned = True
            self.empty((self.chip.l2_bytes,), DType.BYTE, TUNING)

    def host(self, name: str, *, backward: bool = False, times: int = 1) -> None:
        """An operation that the host dispatches, so many times."""
        self.hosts[-1][name + "*" if backward else name] += times


def _nothing(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    return []


def _cast_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    return [gradients[0]]  # brought to the input's type by the engine
