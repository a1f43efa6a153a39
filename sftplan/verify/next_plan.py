"""The plan that is safe after a dry run needed more memory than was foreseen: searched for, not scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftplan.plan.file import document

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

KNOBS = ("precision", "zero", "offload", "checkpointing", "checkpointed_layers", "attention", "loss", "packing",
         "compile", "micro_batch", "accumulation", "allocator")  # fmt: skip


def next_safe_plan(plan: Plan, beyond_bytes: int) -> dict[str, object]:
    """Knobs that differ in the best plan which leaves `beyond_bytes` more free; the global batch stays.

    Pinned knobs stay pinned unless nothing fits with them. Empty: nothing fits at all.
    """
    import sftplan.api
    from sftplan.errors import SftplanError

    inputs, strategy = plan.inputs, plan.strategy
    capacity = plan.memory.gpu.capacity_bytes
    margin = min(0.9, inputs.margin_fraction + beyond_bytes / capacity)
    for pinned in (strategy.pinned, []):
        pins: dict[str, Any] = {
            name: document(getattr(strategy, name)) for name in pinned if hasattr(strategy, name)
        }
        pins["global_batch"] = inputs.workload.global_batch
        try:
            found = sftplan.api.plan(
                model=inputs.model.source if "/" in inputs.model.source else inputs.model.name,
                seq_len=inputs.workload.seq_len,
                hardware=inputs.hardware.name,
                gpus=inputs.hardware.gpus_per_node,
                nodes=inputs.hardware.num_nodes,
                margin=margin,
                **pins,
            )
        except SftplanError:
            continue
        if found.fits:
            return {
                name: document(getattr(found.strategy, name))
                for name in KNOBS
                if getattr(found.strategy, name) != getattr(strategy, name)
            }
    return {}
