"""What a compiled function allocates, in the order of inductor's wrapper code."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftplan.step.tensor import DType


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """One tensor that a compiled graph allocates."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.size

    @property
    def is_weight(self) -> bool:
        """Whether it is a cast weight or a weight's gradient; others have a row for each token."""
        return self.name.startswith("cast ") or (
            self.name.endswith((".grad", " low")) and not self.name.startswith("d ")
        )


@dataclass(slots=True, eq=False)
class Graph:
    """Births (True) and deaths (False) in the wrapper code's order; `held` lives at the end."""

    events: list[tuple[bool, Buffer]] = field(default_factory=list)
    held: dict[str, Buffer] = field(default_factory=dict)

    def new(self, name: str, *shape: int, dtype: DType) -> None:
        """Allocate a buffer."""
        self.held[name] = Buffer(name, shape, dtype)
        self.events.append((True, self.held[name]))

    def free(self, *names: str) -> None:
        """Free buffers; those that this block does not have are passed over."""
        for name in names:
            if name in self.held:
                self.events.append((False, self.held.pop(name)))

    def reuse(self, old: str, name: str) -> None:
        """Write a result over a buffer of the same size."""
        self.held[name] = self.held.pop(old)

    def cast_weights(self) -> list[Buffer]:
        """Weights in the type of products, and gradients of weights in it that are widened."""
        return [
            buffer
            for born, buffer in self.events
            if buffer.is_weight and born is buffer.name.startswith("cast ")
        ]

    def written_bytes(self) -> int:
        """Of all that are born."""
        return sum(buffer.nbytes for born, buffer in self.events if born)

    def row_bytes(self) -> int:
        """Of those with a row for each token."""
        return sum(b.nbytes for born, b in self.events if born and not b.is_weight)

    def peak_bytes(self) -> int:
        """The most bytes that live at once, against those that lived before."""
        live = peak = 0
        for born, buffer in self.events:
            live += buffer.nbytes if born else -buffer.nbytes
            peak = max(peak, live)
        return peak


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled function: what it keeps for the backward pass, and the events of both passes.

    The backward pass begins with `saved` alive, which it frees, and ends with the gradients
    alive. The gradient
    that comes in is held by the autograd engine all the while and is not among the events.
    """

    saved: tuple[Buffer, ...]
    forward: Graph
    backward: Graph

    @property
    def saved_bytes(self) -> int:
        """Bytes kept between the passes."""
        return sum(x.nbytes for x in self.saved)
