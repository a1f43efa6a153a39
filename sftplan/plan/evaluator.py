"""The cost model of a job, with a tracer where the tape does not know the model's family."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sftplan.cost.evaluate import Evaluator
from sftplan.cost.tapes import Tapes
from sftplan.errors import NotReadyError
from sftplan.facts.tracing import ask
from sftplan.step.repeat import FEW_LAYERS
from sftplan.step.simulate import STEADY_PASSES
from sftplan.step.traced import read_pass, repeats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload
    from sftplan.step.batch import Batch
    from sftplan.step.chip import Chip
    from sftplan.step.traced import Pass

TRACED_KNOBS = (
    "precision", "checkpointing", "attention", "loss", "packing", "attention_dropout",
)  # fmt: skip


def make_tapes(model: ModelShape, workload: Workload) -> Tapes:
    """Simulated steps of a job."""
    return Tapes(model, workload, tracer=trace)


def make_evaluator(
    model: ModelShape, workload: Workload, *, num_gpus: int, gpus_per_node: int
) -> Evaluator:
    """The costs of a job."""
    return Evaluator(model, workload, num_gpus=num_gpus, gpus_per_node=gpus_per_node, tracer=trace)


def trace(model: ModelShape, strategy: Strategy, batch: Batch, chip: Chip) -> Sequence[Pass]:
    """The passes of the real model on fake tensors, from a process that has PyTorch."""
    assert model.anatomy is not None
    question = {
        "what": "passes",
        "config": model.anatomy.config,
        "num_layers": model.num_layers,
        "strategy": {name: getattr(strategy, name) for name in TRACED_KNOBS},
        "batch": asdict(batch),
        "chip": asdict(chip),
        "num_passes": min(strategy.accumulation, STEADY_PASSES),
    }
    found = [read_pass(each) for each in ask(question)["passes"]]
    if model.anatomy.alike and model.num_layers == FEW_LAYERS and not all(map(repeats, found)):
        message = f"{model.model_type}: its layers do not all do the same, though they look alike"
        raise NotReadyError(message, "such a model cannot be planned yet")
    return found
