"""Gradients summed over the ranks while the backward pass goes on: each bucket leaves when it is full.

Buckets hold the weights from the last to the first, about as their gradients come. They leave in this
order on every rank, whatever comes first there, and are summed where they lie, without a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from sftplan.facts.buckets import SUM_BUCKET_ELEMENTS
from sftplan.step.update import buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensor = torch.Tensor


class SummedGradients:
    """The gradients of `parameters`, which every rank holds whole."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        backwards = list(reversed(parameters))
        groups = buckets([each.numel() for each in backwards], SUM_BUCKET_ELEMENTS)
        self._buckets = [[backwards[number] for number in group] for group in groups]
        self._missing: list[
            set[int]
        ] = []  # of each bucket the weights whose gradients are yet to come
        self._formed: set[int] = (
            set()
        )  # weights whose gradients will not come: they are complete before
        self._sent = 0
        self._works: list[distributed.Work] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if self._missing:
                self._missing[number].discard(id(parameter))
                self._send()

        return arrived

    def formed(self, parameter: Tensor) -> None:
        """The next backward pass has nothing to add to the gradient of this one."""
        self._formed.add(id(parameter))

    def begin(self) -> None:
        """The backward pass comes after which gradients are complete."""
        self._missing = [{id(each) for each in bucket} - self._formed for bucket in self._buckets]
        self._formed = set()
        self._sent = 0
        self._send()

    def finish(self) -> None:
        """Send what did not fill up, and let the device wait for all of it.

        A weight that was not used here may have been used by another rank: all have to take part.
        """
        for parameter in (each for bucket in self._buckets for each in bucket):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._missing = [set() for _ in self._buckets]
        self._send()
        self._missing = []
        for work in self._works:
            work.wait()
        self._works.clear()

    def _send(self) -> None:
        while self._sent < len(self._buckets) and not self._missing[self._sent]:
            bucket = self._buckets[self._sent]
            self._works.append(_sum([p.grad for p in bucket if p.grad is not None]))
            self._sent += 1


def _sum(gradients: list[Tensor]) -> distributed.Work:
    """One collective of many tensors, on the stream that the backend has for itself."""
    options = distributed_c10d.AllreduceCoalescedOptions()
    options.asyncOp = True
    group = distributed.group.WORLD
    assert group is not None
    return group.allreduce_coalesced(gradients, options)
