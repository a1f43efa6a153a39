"""What one training step costs on given hardware: the numbers that the cost model fills in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Memory of the fullest GPU over a steady step, when the optimizer's states exist.

    `peak_allocated_bytes` and `peak_reserved_bytes` mean what torch.cuda.max_memory_allocated()
    and max_memory_reserved() return; `used_bytes` what the driver shows for the process: reserved,
    context and NCCL. `by_category` adds up to `peak_allocated_bytes`. `capacity_bytes` is what a
    process may take: the card less what other processes hold.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context_bytes: int
    used_bytes: int
    capacity_bytes: int
    peak_at: str
    by_category: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Memory of one host over a step, all its ranks together."""

    peak_bytes: int
    by_category: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """FLOPs; a multiply and an add are two.

    Per token without recomputation, forward and backward; `step_flops` over all GPUs is what the
    hardware executes, with recomputation.
    """

    flops_per_token: int
    linear_flops_per_token: int
    attention_flops_per_token: int
    step_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step and where they go; a part that nobody can tell is None."""

    step_s: float | None
    compute_s: float | None
    memory_s: float | None
    dispatch_s: float | None
    communication_s: float | None
    offload_s: float | None
    optimizer_s: float | None
    startup_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One strategy, one workload, one piece of hardware. Per step means over all GPUs."""

    memory: GpuMemory
    host: HostMemory
    compute: Compute
    time: StepTime
    tokens_per_step: float
    examples_per_step: float
    rows_per_step: int
