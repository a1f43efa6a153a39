"""The memory of a plan's step over its events, computed again from what the plan says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sftplan.cost.captured import as_captured
from sftplan.cost.evaluate import chip_of
from sftplan.cost.timeline import Timeline, last_step
from sftplan.facts.captured import is_captured
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import Strategy
from sftplan.facts.workload import Workload
from sftplan.plan.evaluator import make_evaluator

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.plan.record import Plan
    from sftplan.plan.record_inputs import StrategyRecord
    from sftplan.step.repeat import Events


def plan_timeline(plan: Plan) -> Timeline:
    """Predicted live bytes by category over a steady step.

    Raises:
        UsageError: The plan's model is not to be found any more.
    """
    machine = plan.inputs.hardware
    strategy = strategy_of(plan.strategy)
    events = events_of(
        plan, strategy, num_gpus=machine.num_gpus, gpus_per_node=machine.gpus_per_node
    )  # fmt: skip
    if passes_captured(plan, strategy):
        events = as_captured(events).events
    return last_step(events).thinned()


def events_of(plan: Plan, strategy: Strategy, *, num_gpus: int, gpus_per_node: int) -> Events:
    """Every birth and death of a storage of one rank in the first two steps, and while they are built.

    Raises:
        UsageError: The plan's model is not to be found any more.
    """
    model = model_of(plan)
    evaluator = make_evaluator(
        model, workload_of(plan), num_gpus=num_gpus, gpus_per_node=gpus_per_node
    )
    return evaluator.events(strategy, chip_of(plan.inputs.hardware.gpu))


def passes_captured(plan: Plan, strategy: Strategy) -> bool:
    """Whether the passes of the plan's job under a strategy are CUDA graphs.

    Raises:
        UsageError: The plan's model is not to be found any more.
    """
    return is_captured(strategy, model_of(plan), plan.inputs.workload.seq_len)


def model_of(plan: Plan) -> ModelShape:
    """The model that the plan names, looked up again: it may have changed since.

    Raises:
        UsageError: It is not to be found any more.
    """
    facts = plan.inputs.model
    return resolve_model(facts.name if facts.source == "builtin" else facts.source)


def strategy_of(record: StrategyRecord) -> Strategy:
    """The strategy, without what was pinned of it."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(Strategy)}
    return Strategy(**fields)


def workload_of(plan: Plan) -> Workload:
    """The work as the search saw it."""
    work = plan.inputs.workload
    return Workload(
        seq_len=work.seq_len,
        global_batch=work.global_batch,
        global_batch_pinned=True,
        epochs=work.epochs,
        num_examples=work.num_examples,
        num_tokens=work.num_tokens,
        lengths=work.lengths,
        train_on_prompt=work.train_on_prompt,
    )
