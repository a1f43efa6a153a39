"""What a plan's steps need, where building the model needs more: a dry run measures steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.cost.memory import BUILDING, exact_peaks
from sftplan.facts.strategy import Allocator
from sftplan.plan.timeline import events_of, passes_captured, strategy_of
from sftplan.verify.measurement import memory_quantities

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def steps_alone(plan: Plan) -> dict[str, float]:
    """Memory of the plan's steps by the plan's keys; empty where its peak is one of theirs.

    DeepSpeed lays weights flat beside the old ones, which is the most that a model needs whose
    optimizer is on the host and whose rows are few.
    """
    if plan.memory.gpu.peak_at != BUILDING:
        return {}
    strategy, machine = strategy_of(plan.strategy), plan.inputs.hardware
    events = events_of(
        plan, strategy, num_gpus=machine.num_gpus, gpus_per_node=machine.gpus_per_node
    )
    peaks = exact_peaks(
        events, expandable=strategy.allocator is Allocator.EXPANDABLE,
        captured=passes_captured(plan, strategy), steps_alone=True,
    )  # fmt: skip
    return memory_quantities(plan, peaks.allocated_bytes, peaks.reserved_bytes)
