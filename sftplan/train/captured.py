"""Forward and backward passes as CUDA graphs: issued by the host once, then replayed in one call each.

A compiled block costs its host about a millisecond a call, whatever the GPU does meanwhile: with few
tokens a step that is most of it. All shapes of a run are fixed, so nothing has to be decided again.
Captured are the first pass of a step, which brings gradients into being, and the passes that add to
them; between ranks also the last one, during which gradients are summed. They share one pool of memory,
in which gradients stay where the backward pass left them; what is read of a pass lies in tensors that
are written over before each replay. What cannot be captured is issued operation by operation, as before.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.train.redraws import default_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sftplan.train.inputs import Inputs
    from sftplan.train.redraws import Redraws
    from sftplan.train.summing import SummedGradients

Tensor = torch.Tensor
EAGER_STEPS = 1  # that compile, load kernels and create the optimizer's states


class NotCapturableError(RuntimeError):
    """A pass does what a graph cannot hold: it waits for the GPU, say."""


@dataclass(slots=True)
class _Pass:
    """The graphs of a pass, its loss, and the gradients that it leaves."""

    forward: torch.cuda.CUDAGraph
    loss: Tensor
    backward: torch.cuda.CUDAGraph | None = None
    gradients: tuple[Tensor | None, ...] = ()


class CapturedPasses:
    """The passes of one model's steps; nothing is captured during the first step.

    `summed` are the gradients that all ranks sum, if there is more than one; `redraws` the random numbers
    that a backward pass draws as its forward pass did.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], summed: SummedGradients | None = None,
        redraws: Redraws | None = None,
    ) -> None:  # fmt: skip
        self._failure: str | None = None
        self._said = False
        self._parameters = list(parameters)
        self._summed = summed
        self._redraws = redraws
        self._passes: dict[tuple[bool, bool], _Pass] = {}
        self._read: tuple[Inputs, Tensor] | None = None
        self._stream: Any = None
        self._pool: Any = None
        self._steps = 0

    def begin_step(self) -> bool:
        """Whether the step that begins is captured, or replayed."""
        self._steps += 1
        return self._failure is None and self._steps > EAGER_STEPS

    def run(
        self, forward: Callable[[Inputs, Tensor], Tensor], inputs: Inputs, factor: Tensor, *,
        first: bool, last: bool, mark: Callable[[str], None],
    ) -> Tensor | None:  # fmt: skip
        """The loss of a pass, its gradients added, those of the `last` one summed; `first` where there are none.

        Nothing is done, and None returned, where the pass cannot be captured.
        """
        kind = first, last and self._summed is not None
        gradients = [parameter.grad for parameter in self._parameters]
        try:
            return self._run(kind, forward, inputs, factor, mark)
        except NotCapturableError as error:
            self.release()
            self._failure = str(error)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return None

    def _run(
        self, kind: tuple[bool, bool], forward: Callable[[Inputs, Tensor], Tensor], inputs: Inputs,
        factor: Tensor, mark: Callable[[str], None],
    ) -> Tensor:  # fmt: skip
        mark("forward")
        read = self._filled(inputs, factor)
        known = self._passes.get(kind)
        if known is None:
            known = self._passes[kind] = _Pass(*self._captured(lambda: forward(*read)))
        if self._redraws is not None:
            self._redraws.rewind()
        known.forward.replay()
        mark("backward")
        if known.backward is None:
            self._capture_backward(known, sums=kind[1])
        assert known.backward is not None
        known.backward.replay()
        for parameter, gradient in zip(self._parameters, known.gradients, strict=True):
            parameter.grad = gradient
        return known.loss.detach()

    def explain(self, say: Callable[[str], None]) -> None:
        """Say once why nothing is captured, if nothing is."""
        if self._failure is not None and not self._said:
            say(f"not as CUDA graphs, hence slower than planned: {self._failure}")
            self._said = True

    def release(self) -> None:
        """Give the pool back, for what else needs memory between steps; the next pass captures anew."""
        if self._pool is None:
            return
        torch.cuda.synchronize()
        for parameter in self._parameters:
            parameter.grad = None
        self._passes.clear()
        self._read = self._pool = None
        torch._C._cuda_clearCublasWorkspaces()
        gc.collect()
        torch.cuda.empty_cache()

    def _filled(self, inputs: Inputs, factor: Tensor) -> tuple[Inputs, Tensor]:
        """The tensors that the graphs read, with this pass' values."""
        given = _tensors(inputs)
        if self._read is None:
            copies: dict[str, Any] = {name: tensor.clone() for name, tensor in given.items()}
            self._read = replace(inputs, **copies), factor.clone()
            return self._read
        own, own_factor = self._read
        for name, tensor in _tensors(own).items():
            tensor.copy_(given[name])  # of another shape it would not fit
        own_factor.copy_(factor)
        return self._read

    def _captured(
        self, function: Callable[[], Any], redraws: Redraws | None = None
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what `function` does, in our pool and on our stream; nothing of it runs yet.

        Loading data on another thread may go on meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        if redraws is not None:
            redraws.register(graph)
        if self._pool is None:  # what the first step kept for itself goes
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        failure, result = None, None
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        self._agree(failure)
        return graph, result

    def _agree(self, failure: str | None) -> None:
        """All ranks go the same way; a generator that is left in capture begins anew."""
        failed = failure is not None
        if self._summed is not None:
            flag = torch.full((), float(failed), device=self._parameters[0].device)
            distributed.all_reduce(flag)
            failed = bool(flag)
        if failed:
            generator = default_generator()
            generator.graphsafe_set_state(generator.clone_state())
            if self._redraws is not None:
                self._redraws.restart()
            raise NotCapturableError(failure or "another rank could not capture it")

    def _capture_backward(self, known: _Pass, *, sums: bool) -> None:
        def backward() -> None:
            if sums and self._summed is not None:
                self._summed.begin()
            known.loss.backward()  # type: ignore[no-untyped-call]
            if sums and self._summed is not None:
                self._summed.finish()

        known.backward, _ = self._captured(backward, self._redraws)
        known.gradients = tuple(parameter.grad for parameter in self._parameters)
        known.loss = known.loss.detach()


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
