"""What travels between GPUs and to the host in a step, and what of it nothing hides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sftplan.cost import comm
from sftplan.facts.buckets import REDUCE_BUCKET_ELEMENTS, SUM_BUCKET_ELEMENTS
from sftplan.facts.strategy import Offload

if TYPE_CHECKING:
    from collections.abc import Callable

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
        hardware: Hardware, backward_s: float,
    ) -> None:  # fmt: skip
        self.bytes = weight_bytes
        self.parameters = parameters
        self.strategy = strategy
        self.hardware = hardware
        bucket = REDUCE_BUCKET_ELEMENTS if strategy.zero else SUM_BUCKET_ELEMENTS
        self.pieces = math.ceil(parameters / bucket)
        self.last_fraction = min(1.0, max(bucket, largest) / parameters)
        self.pass_s = backward_s / strategy.accumulation  # of one pass backward; forward it is half

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
        summed = self._unhidden(self.pass_s, reduced)
        passes = self.strategy.accumulation
        if zero == 0:
            return summed
        if zero < 3:
            times = passes if zero == 2 else 1
            return times * summed + comm.all_gather_s(self.bytes, ranks, gathers)
        forward = self._unhidden(self.pass_s / 2, gathered)
        return passes * (forward + self._unhidden(self.pass_s, gathered, scattered))

    def offload_s(self) -> float:
        """Copies beyond what the backward pass hides, and AdamW on the host.

        Gradients leave in fp32, weights come back in their own type.
        """
        strategy, hardware = self.strategy, self.hardware
        if strategy.offload is Offload.NONE:
            return 0.0
        ranks = hardware.num_gpus
        link = comm.host_link_bytes_per_s(hardware)
        copy = comm.copy_s(self.bytes / ranks, link)
        on_node = self.parameters / ranks * hardware.gpus_per_node
        adam = comm.cpu_adam_s(on_node, comm.cpu_adam_bytes_per_s(hardware))
        passes = strategy.accumulation
        leaving = comm.copy_s(self.parameters * comm.FP32_BYTES / ranks, link)
        total = passes * self._exposed(leaving, self.pass_s) + adam + copy
        if strategy.offload in (Offload.ALL, Offload.NVME):  # weights come for forward and backward
            total += 2 * passes * self._exposed(copy, self.pass_s / 2)
        return total
