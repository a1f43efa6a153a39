"""What travels between GPUs and to the host in a step, and what of it nothing hides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sftplan.cost import comm
from sftplan.facts.buckets import REDUCE_BUCKET_ELEMENTS, SUM_BUCKET_ELEMENTS
from sftplan.facts.strategy import Offload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.strategy import Strategy

    Collective = tuple[Callable[[float, int, float, int], float], float]  # and bytes per second


class Transfers:
    """Gradients and weights in the weights' type, in buckets while the passes go on.

    Stages 0 and 1 sum gradients once a step, 2 and 3 every pass; 1 and 2 gather the new weights after
    the step, 3 before each use. The sum is an all-reduce in stages 1 and 2 too, of which each rank keeps
    its share (stage_1_and_2.py, allreduce_and_scatter), and a reduce-scatter in stage 3. The table of
    tokens, `largest` elements, is summed last and gathered first: nothing hides it.
    """

    def __init__(
        self, weight_bytes: int, parameters: float, largest: int, strategy: Strategy,
        hardware: Hardware, walls: Mapping[str, float],
    ) -> None:  # fmt: skip
        self.bytes = weight_bytes
        self.parameters = parameters
        self.strategy = strategy
        self.hardware = hardware
        bucket = REDUCE_BUCKET_ELEMENTS if strategy.zero else SUM_BUCKET_ELEMENTS
        self.pieces = math.ceil(parameters / bucket)
        self.last_fraction = min(1.0, max(bucket, largest) / parameters)
        self.forward_s = walls["forward"] / strategy.accumulation  # of one pass
        self.backward_s = walls["backward"] / strategy.accumulation

    def _unhidden(self, hidden_behind: float, *collectives: Collective) -> float:
        """What a pass does not hide of its collectives, in their pieces."""
        ranks, last = self.hardware.num_gpus, self.bytes * self.last_fraction
        seconds = sum(run(self.bytes, ranks, rate, self.pieces) for run, rate in collectives)
        last_s = sum(run(last, ranks, rate, 1) for run, rate in collectives)
        return comm.exposed_s(seconds, hidden_behind, last_s)

    def _exposed(self, seconds: float, hidden_behind: float) -> float:
        """The same of a copy."""
        return comm.exposed_s(seconds, hidden_behind, seconds * self.last_fraction)

    def communication_s(self) -> float:
        """Collectives beyond what the passes hide."""
        ranks, zero = self.hardware.num_gpus, self.strategy.zero
        if ranks < 2:
            return 0.0
        hardware, rates = self.hardware, self.hardware.rates
        reduced = comm.all_reduce_s, comm.link_bytes_per_s(hardware)
        gathers = comm.link_bytes_per_s(hardware, rates.allgather_fraction)
        gathered = comm.all_gather_s, gathers
        scatters = comm.link_bytes_per_s(hardware, rates.reducescatter_fraction)
        scattered = comm.reduce_scatter_s, scatters
        summed = self._unhidden(self.backward_s, reduced)
        passes = self.strategy.accumulation
        if zero == 0:
            return summed
        if zero < 3:
            times = passes if zero == 2 else 1
            return times * summed + comm.all_gather_s(self.bytes, ranks, gathers)
        forward = self._unhidden(self.forward_s, gathered)
        return passes * (forward + self._unhidden(self.backward_s, gathered, scattered))

    def offload_s(self) -> float:
        """Copies beyond what the passes hide, and what the host does to gradients and weights.

        Under stages 1 and 2 the host waits for each gradient's copy (`deepspeed.passes_s`), so nothing
        hides them. Weights come back from pinned memory; under stage 3 they stay where they are
        offloaded, else PyTorch's blocking copy casts them into new memory, which is not pinned (torch
        2.11, aten/src/ATen/native/cuda/Copy.cu).
        """
        strategy, hardware = self.strategy, self.hardware
        if strategy.offload is Offload.NONE:
            return 0.0
        mine, passes = self.parameters / hardware.num_gpus, strategy.accumulation
        link, size = comm.host_link_bytes_per_s(hardware), round(self.bytes / self.parameters)
        rate = comm.cpu_adam_bytes_per_s(hardware)
        clips = strategy.zero == 3 or strategy.max_grad_norm > 0
        total = comm.cpu_update_s(mine * hardware.gpus_per_node, size, rate, clips=clips)
        leaving = comm.copy_s(mine * comm.leaving_bytes(size, passes, stage=strategy.zero), link)
        copy = comm.copy_s(size * mine, link)
        if strategy.zero < 3:
            return total + leaving + copy
        total += passes * self._exposed(leaving / passes, self.backward_s)
        if strategy.offload is Offload.OPTIMIZER:
            return total + comm.copy_s(size * mine, comm.PAGEABLE_BYTES_PER_S)
        come = self._exposed(copy, self.forward_s) + self._exposed(copy, self.backward_s)
        return total + passes * come
