"""A recorder that knows in which layer it is, what the kernels do, and what the host dispatches."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from sftplan.step.compiled.head import head_columns
from sftplan.verify.trace.recorder import Recorder
from sftplan.verify.trace.works import works_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.step.chip import Chip
    from sftplan.verify.trace.works import Work


class LayerRecorder(Recorder):  # type: ignore[no-untyped-call]
    """Marks are the tape's: `forward 3` begins the third layer's forward pass, `backward 3` its backward.

    `works` and `hosts` belong to the marks; `gradients` hold the number of each parameter's storage.
    """

    def __init__(self, chip: Chip, documents: tuple[int, ...] = ()) -> None:
        super().__init__(chip, documents)
        self.vocab_size = 0  # 0: not known yet
        self.works: list[Counter[Work]] = []
        self.hosts: list[Counter[str]] = []
        self.gradients: dict[str, int] = {}
        self._nodes: dict[str, Counter[str]] = {}  # of the backward pass, by layer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; that it is called from here is no operation of the model's."""
        with torch._C.DisableTorchFunction():
            return super().__torch_dispatch__(func, types, args, kwargs)

    def mark(self, phase: str) -> None:
        """A phase begins here, outside of all layers."""
        super().mark(phase)
        self._begin(None)

    def enter(self, layer: int) -> None:
        """The phase goes on in a layer."""
        self.marks.append((len(self.events), f"{self.phase} {layer}"))
        self._begin(layer)

    def leave(self) -> None:
        """The last layer of a forward pass is done."""
        self.marks.append((len(self.events), f"{self.phase} end"))
        self._begin(None)

    def _begin(self, layer: int | None) -> None:
        self.works.append(Counter())
        self.hosts.append(Counter())
        label = self.marks[-1][1]
        if self.backward:  # a node for each operation of the same stretch forward
            twin = f"forward {layer}" if layer is not None else "forward end"
            self.hosts[-1].update(self._nodes.pop(twin, Counter()))
        elif self.phase == "forward":
            self._nodes[label] = Counter()

    def count(self, name: str, differentiable: bool) -> None:
        """The host dispatches an operation; outside of layers a backward pass computes nothing again."""
        if not self.hosts or self.marks[-1][1] == "backward":
            return
        self.hosts[-1][name] += 1
        if differentiable and self.phase == "forward":
            self._nodes[self.marks[-1][1]][f"{name}*"] += 1

    def ran(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """An operator's kernels."""
        if not self.works:
            return
        self.works[-1].update(works_of(func, args, out, self.documents))
        if func is torch.ops.aten._to_copy.default and not self.backward:
            self.count("cast", True)

    def took(self, name: str, gradient: torch.Tensor) -> None:
        """A parameter has its gradient."""
        self.hosts[-1]["AccumulateGrad*"] += 1
        found = self._live.get(gradient.untyped_storage()._cdata)
        if found is not None:
            self.kinds[found[0]] = "gradients"
            self.gradients[name] = found[0]

    def _take(self, func: Any, name: str, args: tuple[Any, ...], out: Any) -> None:
        """Whatever has a column per token of the vocabulary is called logits."""
        before = len(self.sizes)
        super()._take(func, name, args, out)
        if len(self.sizes) > before and isinstance(out, torch.Tensor) and out.ndim > 1:
            padded = head_columns(self.vocab_size)
            if out.shape[-1] in (self.vocab_size, padded):
                self.kinds[-1] = "logits"


def watch(
    recorder: LayerRecorder,
    model: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    *,
    checkpointed: bool,
) -> None:
    """Tell the recorder when a layer begins and when a parameter has its gradient."""

    def entered(number: int) -> None:
        recorder.enter(number)
        if checkpointed:
            recorder.count("checkpoint", False)

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, n=number: entered(n))
        block.register_forward_hook(
            lambda _, __, out, n=number: _entered_by_gradient(
                recorder, out, n, n == len(blocks) - 1
            )
        )
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda p, name=name: recorder.took(name, p.grad)
        )


def _entered_by_gradient(recorder: LayerRecorder, out: Any, number: int, last: bool) -> None:
    """The backward pass enters a layer with the gradient of its result."""
    hidden = out[0] if isinstance(out, (tuple, list)) else out
    hidden.register_hook(lambda _: recorder.enter(number))
    if last:
        recorder.leave()
