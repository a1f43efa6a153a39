"""What the search asks of the cost model, and what it makes of the answers.

The pruning in `explore` relies on three laws, which hold because a step with less saved memory
repeats work and a larger batch repeats none:

1. `bound_bytes` grows with the micro-batch as long as gradients are accumulated. A step of one
   forward pass is apart: no gradients wait beside its activations.
2. Each further checkpointing (none, selective, full), and the loss in chunks, needs at least as
   much time and at most as much memory at the same micro-batch. Of layers that are checkpointed one
   by one, memory is convex in their number.
3. Rows of equal length take no longer in larger micro-batches, within the tie tolerance.
4. An example takes no longer in packed rows without a mask than in padded rows.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from sftplan.cost.estimate import Estimate
    from sftplan.facts.hardware import Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload

Verdict = Literal["fits", "tight", "does_not_fit"]


class Coster(Protocol):
    """Costs of one model and workload on so many GPUs, whichever those are."""

    def bound_bytes(self, strategy: Strategy, hardware: Hardware) -> int:
        """A cheap estimate of the memory used, hardly ever above the exact one."""

    def step_seconds(self, strategy: Strategy, hardware: Hardware) -> float:
        """A cheap step time."""

    def estimate(self, strategy: Strategy, hardware: Hardware) -> Estimate:
        """Everything, with the allocator replayed."""

    def beside(self, known: Estimate, strategy: Strategy, hardware: Hardware) -> Estimate:
        """Everything, with the reserve beyond what is allocated taken from an exact estimate."""


class CosterFactory(Protocol):
    """Makes a coster; the search needs others than its own to prove remedies."""

    def __call__(
        self, model: ModelShape, workload: Workload, *, num_gpus: int, gpus_per_node: int
    ) -> Coster:
        """The coster of that job."""


class Ledger:
    """A coster on one piece of hardware that is asked nothing twice, and counts exact answers."""

    def __init__(self, coster: Coster, hardware: Hardware) -> None:
        self.coster = coster
        self.hardware = hardware
        self._bytes: dict[Strategy, int] = {}
        self._seconds: dict[Strategy, float] = {}
        self._inflation: dict[Strategy, float] = {}  # by branch
        self._exact: dict[Strategy, Estimate] = {}

    @property
    def num_exact(self) -> int:
        """Exact estimates so far."""
        return len(self._exact)

    @property
    def num_cheap(self) -> int:
        """Strategies looked at so far."""
        return len(self._bytes.keys() | self._seconds.keys())

    def used_bytes(self, strategy: Strategy) -> int:
        """The cheap memory of a strategy."""
        if strategy not in self._bytes:
            self._bytes[strategy] = self.coster.bound_bytes(strategy, self.hardware)
        return self._bytes[strategy]

    def inflation(self, strategy: Strategy) -> float:
        """By how much exact estimates of its branch, whatever micro-batch and layers, exceeded cheap ones."""
        return self._inflation.get(_branch(strategy), 1.0) if self._inflation else 1.0

    def step_s(self, strategy: Strategy) -> float:
        """The cheap step time of a strategy."""
        if strategy not in self._seconds:
            self._seconds[strategy] = self.coster.step_seconds(strategy, self.hardware)
        return self._seconds[strategy]

    def exact(self, strategy: Strategy) -> Estimate:
        """The exact estimate of a strategy."""
        if strategy not in self._exact:
            estimate = self._exact[strategy] = self.coster.estimate(strategy, self.hardware)
            over = estimate.memory.used_bytes / max(self.used_bytes(strategy), 1)
            self._inflation[_branch(strategy)] = max(over, self.inflation(strategy))
        return self._exact[strategy]


def _branch(strategy: Strategy) -> Strategy:
    return replace(strategy, micro_batch=1, accumulation=1, checkpointed_layers=None)


def capacity_bytes(hardware: Hardware) -> int:
    """What a process may take of one GPU: the card less what the driver and others hold."""
    gpu = hardware.gpu
    idle = max(gpu.unusable_bytes, hardware.rates.device_bytes)
    return max(0, gpu.memory_bytes - idle - hardware.memory_taken_bytes)


def missing_host_bytes(estimate: Estimate, hardware: Hardware) -> int:
    """What the host lacks; 0 where it has enough or nobody knows what it has."""
    capacity = hardware.host.memory_bytes
    return 0 if capacity is None else max(0, estimate.host.peak_bytes - capacity)


def judge(estimate: Estimate, hardware: Hardware, margin: float) -> Verdict:
    """Whether it fits: with the margin, without it, or not at all."""
    used, capacity = estimate.memory.used_bytes, estimate.memory.capacity_bytes
    if used > capacity or missing_host_bytes(estimate, hardware):
        return "does_not_fit"
    return "fits" if used <= capacity * (1 - margin) else "tight"


def machine_key(hardware: Hardware) -> tuple[object, ...]:
    """What a choice depends on: machines with equal keys have the same best strategy.

    Names and prices are left out, so offers of several clouds may share one search.
    """
    rates = hardware.rates
    figures = (getattr(rates, each.name) for each in fields(rates) if each.name != "sources")
    return (
        hardware.gpu,
        *figures,
        hardware.gpus_per_node,
        hardware.num_nodes,
        hardware.host,
        hardware.memory_taken_bytes,
        hardware.internode_bytes_per_s,
    )
