"""The graph of the backward pass and its engine, in the order in which PyTorch's engine works.

Nodes run by falling sequence number; gradients that meet are added in place where nobody else holds the
first; what a node saved is released when it has run (torch/csrc/autograd/engine.cpp, input_buffer.cpp).
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sftplan.step.tape import Tape
    from sftplan.step.tensor import DType, Tensor

    Backward = Callable[
        [Tape, "Node", list[Tensor | None], list[Tensor]], "Sequence[Tensor | None]"
    ]


class Node:
    """One step of the backward pass.

    `edges` name for each input of the forward op the node (and its slot) that wants the gradient;
    `inputs` their shapes and types, to which gradients are brought before they travel on.
    """

    __slots__ = ("backward", "edges", "extra", "inputs", "name", "num_slots", "saved", "sequence")

    def __init__(
        self,
        name: str,
        sequence: float,
        edges: list[tuple[Node, int] | None],
        backward: Backward,
        inputs: list[tuple[tuple[int, ...], DType]],
    ) -> None:
        self.name = name
        self.sequence = sequence
        self.edges = edges
        self.backward = backward
        self.inputs = inputs
        self.saved: list[Tensor | Handle] = []
        self.num_slots = 1
        self.extra: Any = None


class Handle:
    """A saved tensor of a checkpointed call, not kept: its number within the call."""

    __slots__ = ("frame", "number")

    def __init__(self, frame: Frame, number: int) -> None:
        self.frame = frame
        self.number = number


class StopRecomputation(Exception):  # noqa: N818 - control flow, as in torch.utils.checkpoint
    """Raised once all that the backward pass asked for has been computed again."""


class Frame:
    """One checkpointed call: its function, its inputs, and what it would have saved.

    `kept` holds, under selective checkpointing, the results of products and attention in their order.
    """

    __slots__ = ("function", "inputs", "kept", "num_saved", "recomputed")

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, selective: bool
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.kept: list[Tensor] | None = [] if selective else None
        self.num_saved = 0
        self.recomputed: dict[int, Tensor] | None = None


def count_dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    counts: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            node = edge[0]
            if node in counts:
                counts[node] += 1
            else:
                counts[node] = 1
                stack.append(node)
    return counts


def run_backward(tape: Tape, root: Node, gradient: Tensor) -> None:
    """Run the graph below `root` once, from the gradient of its output."""
    dependencies = count_dependencies(root)
    buffers: dict[Node, list[Tensor | None]] = {root: [gradient]}
    del gradient
    order = 0
    ready: list[tuple[float, int, Node]] = [(-root.sequence, order, root)]
    while ready:
        node = heapq.heappop(ready)[2]
        outputs = _call(tape, node, buffers.pop(node, [None] * node.num_slots))
        node.saved = []
        for position, edge in enumerate(node.edges):
            if edge is None:
                continue
            output, outputs[position] = outputs[position], None
            target, slot = edge
            if output is not None:
                _add(tape, buffers.setdefault(target, [None] * target.num_slots), slot, output)
            del output
            dependencies[target] -= 1
            if not dependencies[target]:
                order += 1
                heapq.heappush(ready, (-target.sequence, order, target))
        del outputs


def _call(tape: Tape, node: Node, gradients: list[Tensor | None]) -> list[Tensor | None]:
    saved = [tape.unpack(item) for item in node.saved] if node.saved else []
    if node.name:
        tape.host(node.name, backward=True)
    outputs = list(node.backward(tape, node, gradients, saved))
    saved.clear()  # what was only computed again goes before its gradients are brought to a type
    for position, output in enumerate(outputs):
        if output is not None and node.edges[position] is not None:
            dtype = node.inputs[position][1]
            if output.dtype is not dtype:
                outputs[position] = tape.cast_gradient(output, dtype)
    gradients.reverse()  # let go from the first to the last, as C++ does; a list begins with its last
    return outputs


def _add(tape: Tape, buffer: list[Tensor | None], slot: int, gradient: Tensor) -> None:
    first = buffer[slot]
    if first is None:
        buffer[slot] = gradient
        return
    if first.owns_storage():
        tape.pointwise("add_", [first, gradient, first])
        return
    del first
    held = buffer[slot]
    assert held is not None
    total = tape.empty(held.shape, held.dtype)
    tape.pointwise("add", [held, gradient, total])
    buffer[slot] = total
