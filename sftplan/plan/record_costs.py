"""What a plan will cost: memory, compute, time and money in its record, and what else there was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["fits", "tight", "does_not_fit"]
KnobValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Memory of the fullest GPU over a steady step.

    `used_bytes` is what the driver shows for the process; `headroom_bytes` is capacity less used,
    negative when it does not fit. `by_category` adds up to `peak_allocated_bytes`.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context_bytes: int
    used_bytes: int
    capacity_bytes: int
    headroom_bytes: int
    peak_at: str
    by_category: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Memory of one host, all its ranks together."""

    peak_bytes: int
    capacity_bytes: int | None
    by_category: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory on the GPU and on the host."""

    gpu: GpuMemory
    host: HostMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """FLOPs; per token without recomputation, per step over all GPUs with it."""

    flops_per_token: int
    linear_flops_per_token: int
    attention_flops_per_token: int
    step_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Seconds of a step and of the run. `mfu_fraction` is of the GPU's dense peak."""

    step_s: float | None
    compute_s: float | None
    memory_s: float | None
    dispatch_s: float | None
    communication_s: float | None
    offload_s: float | None
    optimizer_s: float | None
    tokens_per_s: float | None
    mfu_fraction: float | None
    num_steps: int | None
    startup_s: float | None
    total_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Money for the whole run on all nodes."""

    usd: float | None
    usd_per_hour: float | None
    price_as_of: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedBytes:
    """The one figure of GPU memory that a neighbour carries."""

    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourMemory:
    """A neighbour's memory, under the plan's own keys."""

    gpu: UsedBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourTime:
    """A neighbour's step time, under the plan's own key."""

    step_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """The plan with one decision changed."""

    change: dict[str, KnobValue]
    memory: NeighbourMemory
    time: NeighbourTime
    verdict: Verdict
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change after which the job fits; the search has tried it."""

    change: dict[str, KnobValue]
    used_bytes: int
    verdict: Verdict
