"""From a choice of the search to the frozen plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING, Literal

from sftplan import __version__
from sftplan.facts.largest import largest_block
from sftplan.facts.params import num_parameters
from sftplan.plan.file import document
from sftplan.plan.launch import build_launch
from sftplan.plan.notes import find_assumptions, find_sources, find_warnings, host_warnings
from sftplan.plan.record import Plan, Reason
from sftplan.plan.record_costs import (
    Compute,
    Cost,
    GpuMemory,
    HostMemory,
    Memory,
    Neighbour,
    NeighbourMemory,
    NeighbourTime,
    Remedy,
    Time,
    UsedBytes,
)
from sftplan.plan.record_inputs import (
    HardwareFacts,
    Inputs,
    ModelFacts,
    StrategyRecord,
    WorkloadFacts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.cost.estimate import Estimate
    from sftplan.facts.hardware import Gpu, Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Precision, Strategy
    from sftplan.facts.workload import Workload
    from sftplan.plan.choice import Alternative, Choice

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
SECONDS_PER_HOUR = 3600


def _field_values(value: object) -> dict[str, object]:
    assert dataclasses.is_dataclass(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def shape_sha256(model: ModelShape) -> str:
    """SHA-256 of the shape, whatever it is called and wherever it is from."""
    shape = {k: v for k, v in _field_values(model).items() if k not in {"name", "source", "hub_id"}}
    return hashlib.sha256(json.dumps(document(shape), sort_keys=True).encode()).hexdigest()


def model_facts(model: ModelShape) -> ModelFacts:
    """The model in the plan; full fine-tuning trains every parameter."""
    total = num_parameters(model)
    return ModelFacts(
        name=model.name,
        source=model.source,
        hub_id=model.hub_id,
        model_type=model.model_type,
        num_parameters=total,
        num_trainable=total,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        tied_embeddings=model.tied_embeddings,
        shape_sha256=shape_sha256(model),
    )


def hardware_facts(hardware: Hardware) -> HardwareFacts:
    """The hardware in the plan; the price is for all nodes."""
    price = hardware.usd_per_hour
    return HardwareFacts(
        name=hardware.name,
        num_gpus=hardware.num_gpus,
        gpus_per_node=hardware.gpus_per_node,
        num_nodes=hardware.num_nodes,
        gpu=hardware.gpu,
        host=hardware.host,
        rates=hardware.rates,
        memory_taken_bytes=hardware.memory_taken_bytes,
        internode_bytes_per_s=hardware.internode_bytes_per_s,
        usd_per_hour=None if price is None else price * hardware.num_nodes,
        price_as_of=hardware.price_as_of,
        calibration=hardware.calibration,
        notes=list(hardware.notes),
    )


def workload_facts(workload: Workload, estimate: Estimate) -> WorkloadFacts:
    """The work in the plan; `global_batch` in rows, whatever it was asked for in."""
    return WorkloadFacts(
        seq_len=workload.seq_len,
        global_batch=estimate.rows_per_step,
        tokens_per_step=float(estimate.tokens_per_step),
        examples_per_step=float(estimate.examples_per_step),
        epochs=float(workload.epochs),
        num_examples=workload.num_examples,
        num_tokens=workload.num_tokens,
        response_fraction=workload.response_fraction,
        lengths=workload.lengths,
        train_on_prompt=workload.train_on_prompt,
    )


def memory_record(estimate: Estimate, hardware: Hardware) -> Memory:
    """Memory in the plan; the contract's categories are always there."""
    gpu = estimate.memory
    return Memory(
        gpu=GpuMemory(
            peak_allocated_bytes=gpu.peak_allocated_bytes,
            peak_reserved_bytes=gpu.peak_reserved_bytes,
            context_bytes=gpu.context_bytes,
            used_bytes=gpu.used_bytes,
            capacity_bytes=gpu.capacity_bytes,
            headroom_bytes=gpu.capacity_bytes - gpu.used_bytes,
            peak_at=gpu.peak_at,
            by_category=dict.fromkeys(CATEGORIES, 0) | dict(gpu.by_category),
        ),
        host=HostMemory(
            peak_bytes=estimate.host.peak_bytes,
            capacity_bytes=hardware.host.memory_bytes,
            by_category=dict(estimate.host.by_category),
        ),
    )


def peak_flops_per_s(gpu: Gpu, precision: Precision) -> float | None:
    """The dense datasheet peak against which a precision's utilization is told."""
    if precision == "fp32":
        return gpu.fp32_flops_per_s
    return gpu.fp16_flops_per_s if precision == "fp16-mixed" else gpu.bf16_flops_per_s


def num_steps(workload: Workload, estimate: Estimate) -> int | None:
    """Optimizer steps of the whole run; None when nobody said how much work there is."""
    if workload.num_examples is not None:
        return math.ceil(workload.epochs * workload.num_examples / estimate.examples_per_step)
    if workload.num_tokens is not None:
        return math.ceil(workload.epochs * workload.num_tokens / estimate.tokens_per_step)
    return None


def time_record(
    estimate: Estimate, hardware: Hardware, workload: Workload, precision: Precision
) -> Time:
    """Step and run time; model FLOPs utilization counts no recomputation."""
    time, steps = estimate.time, num_steps(workload, estimate)
    tokens_per_s = mfu = total_s = None
    if time.step_s:
        tokens_per_s = estimate.tokens_per_step / time.step_s
        peak = peak_flops_per_s(hardware.gpu, precision)
        if peak:
            mfu = estimate.compute.flops_per_token * tokens_per_s / (peak * hardware.num_gpus)
        if steps is not None:
            total_s = (time.startup_s or 0.0) + steps * time.step_s
    return Time(
        step_s=time.step_s,
        compute_s=time.compute_s,
        memory_s=time.memory_s,
        dispatch_s=time.dispatch_s,
        communication_s=time.communication_s,
        offload_s=time.offload_s,
        optimizer_s=time.optimizer_s,
        tokens_per_s=tokens_per_s,
        mfu_fraction=mfu,
        num_steps=steps,
        startup_s=time.startup_s,
        total_s=total_s,
    )


def cost_record(hardware: HardwareFacts, total_s: float | None) -> Cost:
    """Money for the run: the price of all nodes, from start to end."""
    price, usd = hardware.usd_per_hour, None
    if price is not None and total_s is not None:
        usd = price * total_s / SECONDS_PER_HOUR
    return Cost(
        usd=usd,
        usd_per_hour=price,
        price_as_of=hardware.price_as_of,
    )


def strategy_record(strategy: Strategy, pinned: Sequence[str]) -> StrategyRecord:
    """The strategy in the plan, with the names of what was given."""
    return StrategyRecord(
        precision=strategy.precision,
        zero=strategy.zero,
        offload=strategy.offload,
        checkpointing=strategy.checkpointing,
        checkpointed_layers=strategy.checkpointed_layers,
        attention=strategy.attention,
        loss=strategy.loss,
        packing=strategy.packing,
        compile=strategy.compile,
        micro_batch=strategy.micro_batch,
        accumulation=strategy.accumulation,
        optimizer=strategy.optimizer,
        allocator=strategy.allocator,
        attention_dropout=strategy.attention_dropout,
        max_grad_norm=float(strategy.max_grad_norm),
        pinned=list(pinned),
    )


def _neighbour(other: Alternative) -> Neighbour:
    return Neighbour(
        change=dict(other.change),
        memory=NeighbourMemory(gpu=UsedBytes(used_bytes=other.estimate.memory.used_bytes)),
        time=NeighbourTime(step_s=other.estimate.time.step_s),
        verdict=other.verdict,
        reason=other.reason,
    )


def _remedy(other: Alternative) -> Remedy:
    return Remedy(
        change=dict(other.change),
        used_bytes=other.estimate.memory.used_bytes,
        verdict=other.verdict,
    )


def plan_from_choice(
    choice: Choice,
    *,
    model: ModelShape,
    hardware: Hardware,
    workload: Workload,
    pinned: Sequence[str],
    margin: float,
    minimize: Literal["time", "cost", "memory"],
    command: Sequence[str],
    assumptions: Sequence[str] = (),
) -> Plan:
    """The plan of a choice: everything that `show`, `verify` and `launch` will need."""
    estimate, strategy = choice.estimate, choice.strategy
    machine = hardware_facts(hardware)
    time = time_record(estimate, hardware, workload, strategy.precision)
    nodes = {"gpus_per_node": hardware.gpus_per_node, "num_nodes": hardware.num_nodes}
    return Plan(
        created_by=f"sftplan {__version__}",
        command=list(command),
        inputs=Inputs(
            model=model_facts(model),
            hardware=machine,
            workload=workload_facts(workload, estimate),
            margin_fraction=margin,
            minimize=minimize,
        ),
        strategy=strategy_record(strategy, pinned),
        fits=choice.verdict != "does_not_fit",
        verdict=choice.verdict,
        memory=memory_record(estimate, hardware),
        compute=Compute(**_field_values(estimate.compute)),  # type: ignore[arg-type]
        time=time,
        cost=cost_record(machine, time.total_s),
        neighbours=[_neighbour(other) for other in choice.neighbours],
        why=[Reason(choice=what, reason=reason) for what, reason in choice.reasons],
        remedies=[_remedy(other) for other in choice.remedies],
        warnings=[
            *host_warnings(choice.host_needed_bytes, hardware.host),
            *find_warnings(model, hardware.gpu, strategy, workload),
        ],
        assumptions=[*assumptions, *find_assumptions(model, strategy, hardware.num_gpus)],
        sources=find_sources(hardware, model),
        launch=build_launch(strategy, block_elements=largest_block(model), **nodes),
    )
