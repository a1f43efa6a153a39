"""What becomes of a weight's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.tensor import Tensor

if TYPE_CHECKING:
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape

ACCUMULATE = "accumulate"  # gradients are added up; the first pass of a step has none to add to
LEAF_SEQUENCE = float("inf")  # AccumulateGrad runs as soon as its gradient is there


def accumulate(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    """The leaf takes a gradient over, or adds it in place to the one it has."""
    gradient = gradients[0]
    if gradient is None:  # it was added in the forward pass
        assert node.extra is not None
        return []
    if tape.on_gradient is not None and tape.on_gradient(gradient):
        tape.pointwise("copy", [gradient, gradient])
        node.extra = None  # those of the passes before have gone with it
    elif isinstance(node.extra, Tensor):
        tape.pointwise(ACCUMULATE, [node.extra, gradient, node.extra])
    else:
        tape.relabel(gradient, "gradients")
        node.extra = gradient.detach()
    return []
