"""Tensors without data: a shape, a type, and a storage whose birth and death go on the tape.

A storage dies when its last reference does, exactly as PyTorch's do: the blocks in step/blocks.py are
written with the local variables of the modelling code they stand for, so lifetimes need no bookkeeping.
"""

from __future__ import annotations

import sys
from math import prod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from sftplan.step.autograd import Node


class DType:
    """An element type: its name and its size in bytes. The few there are are compared by identity."""

    __slots__ = ("label", "size")

    FP32: ClassVar[DType]
    BF16: ClassVar[DType]
    FP16: ClassVar[DType]
    INT64: ClassVar[DType]
    INT32: ClassVar[DType]
    INT16: ClassVar[DType]
    BYTE: ClassVar[DType]

    def __init__(self, label: str, size: int) -> None:
        self.label = label
        self.size = size

    def __repr__(self) -> str:
        return self.label


DType.FP32 = DType("fp32", 4)
DType.BF16 = DType("bf16", 2)
DType.FP16 = DType("fp16", 2)
DType.INT64 = DType("int64", 8)
DType.INT32 = DType("int32", 4)
DType.INT16 = DType("int16", 2)
DType.BYTE = DType("byte", 1)


class Storage:
    """One block of memory; `index` is its place in the tape's list of sizes."""

    __slots__ = ("events", "index")

    def __init__(self, events: list[int], index: int) -> None:
        self.events = events
        self.index = index
        events.append(index)

    def __del__(self) -> None:
        self.events.append(~self.index)


class Tensor:
    """A view of a storage; `node` is what its gradient flows to, None where none is wanted.

    `strided` says that the memory is in another order than the shape: such a tensor has to be copied
    before it can be seen in a shape of fewer dimensions. `viewed`: a transposed view of a result, to
    which the engine adds nothing in place.
    """

    __slots__ = ("dtype", "is_leaf", "node", "shape", "slot", "storage", "strided", "viewed")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        storage: Storage,
        node: Node | None = None,
        slot: int = 0,
        *,
        is_leaf: bool = False,
        strided: bool = False,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.storage = storage
        self.node = node
        self.slot = slot
        self.is_leaf = is_leaf
        self.strided = strided
        self.viewed = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that this view shows."""
        size = self.dtype.size
        for extent in self.shape:
            size *= extent
        return size

    def detach(self) -> Tensor:
        """The same memory outside the graph."""
        return Tensor(self.shape, self.dtype, self.storage, strided=self.strided)

    def view(self, *shape: int) -> Tensor:
        """The same memory in another shape, outside the graph."""
        return Tensor(shape, self.dtype, self.storage)

    def owns_storage(self) -> bool:
        """Whether nobody else refers to the storage: then a gradient may be added in place."""
        return not self.viewed and sys.getrefcount(self.storage) <= 2  # this tensor, the call
