"""What kernels have to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sftplan.step.tensor import DType

MIXED = (1,)  # operands of several types: not vectorised
BROADCAST = (2,)  # operands of several shapes: every index computed
STRIDED = (3,)  # operands in another memory order, likewise


class Work(NamedTuple):
    """What a kernel has to do: `flops` on the units of `dtype`, `nbytes` to and from memory.

    `shape` is the product's or the attention's; of a pointwise kernel, how it reads: MIXED, BROADCAST,
    STRIDED or ().
    """

    kind: str
    dtype: DType
    flops: int
    nbytes: int
    shape: tuple[int, ...] = ()
