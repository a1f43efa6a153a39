"""What a dry run found out about a plan's step, on a GPU or by tracing: plain numbers, ready to be judged."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - for whoever reads the annotations
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sftplan.cost.timeline import Timeline
    from sftplan.plan.record import Plan

ALLOCATED, RESERVED = "memory.gpu.peak_allocated_bytes", "memory.gpu.peak_reserved_bytes"
USED, CONTEXT = "memory.gpu.used_bytes", "memory.gpu.context_bytes"
HOST = "memory.host.peak_bytes"
STEP, TOKENS, MFU = "time.step_s", "time.tokens_per_s", "time.mfu_fraction"
FLOPS = "compute.step_flops"
OPTIMIZER, STARTUP = "time.optimizer_s", "time.startup_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of the step, all passes together; what was not measured is None."""

    name: str  # forward, backward, optimizer; data is what the host waited for
    seconds: float | None = None
    peak_allocated_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """Where an allocation failed, and what was taken then; `others_bytes` by other processes."""

    phase: str
    step: int
    allocated_bytes: int
    reserved_bytes: int
    free_bytes: int
    total_bytes: int
    others_bytes: int | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """`quantities` are by the plan's own keys, in its units; what was not measured is missing.

    `instead` are predictions of the step that was measured, where that is not quite the plan's.
    """

    mode: Literal["gpu", "trace"]
    quantities: Mapping[str, float]
    instead: Mapping[str, float] = field(default_factory=dict)  # predictions of what really ran
    phases: tuple[Phase, ...] = ()
    out_of_memory: OutOfMemory | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    timeline: Timeline | None = None
    notes: tuple[str, ...] = ()  # what disturbed it, or was done otherwise than planned
    rehearsal: bool = False  # a smaller card on a bigger one: its times say nothing


def memory_quantities(plan: Plan, allocated_bytes: int, reserved_bytes: int) -> dict[str, float]:
    """The allocator's peaks by the plan's keys; what lies outside of it is the plan's."""
    gpu = plan.memory.gpu
    outside = gpu.used_bytes - gpu.peak_reserved_bytes
    return {
        ALLOCATED: allocated_bytes, RESERVED: reserved_bytes, USED: reserved_bytes + outside,
    }  # fmt: skip
