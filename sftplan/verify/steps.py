"""What a plan's steps need, where building the model needs more: a dry run measures steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.cost.memory import BUILDING, exact_peaks
from sftplan.facts.strategy import Allocator, is_captured
from sftplan.plan.timeline import plan_events, strategy_of
from sftplan.verify import measurement as keys

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def steps_alone(plan: Plan) -> dict[str, float]:
    """Memory of the plan's steps by the plan's keys; empty where its peak is one of theirs.

    DeepSpeed lays weights flat beside the old ones, which is the most that a model needs whose
    optimizer is on the host and whose rows are few.
    """
    gpu = plan.memory.gpu
    if gpu.peak_at != BUILDING:
        return {}
    strategy = strategy_of(plan.strategy)
    peaks = exact_peaks(
        plan_events(plan), expandable=strategy.allocator is Allocator.EXPANDABLE,
        captured=is_captured(strategy), steps_alone=True,
    )  # fmt: skip
    return {
        keys.ALLOCATED: peaks.allocated_bytes,
        keys.RESERVED: peaks.reserved_bytes,
        keys.USED: peaks.reserved_bytes + gpu.used_bytes - gpu.peak_reserved_bytes,
    }
