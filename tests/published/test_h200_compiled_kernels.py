"""What a GPU was busy for in compiled steps, kernel by kernel, against the plan's."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sftplan.cost import kernels
from sftplan.cost.passes import Passes
from sftplan.cost.time import time_of
from sftplan.facts.catalogue import builtin
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Strategy
from sftplan.plan.request import read_pins
from sftplan.step.batch import Batch
from sftplan.step.few import few_layers
from sftplan.step.simulate import steady

if TYPE_CHECKING:
    import pytest

FILE = Path(__file__).with_name("h200_compiled_kernels.csv")
KNOBS = ("precision", "checkpointing", "loss")
CLASSES = ("products_s", "varlen_s", "varlen_backward_s", "memory_bound_s", "update_s")


def planned_s(row: dict[str, str]) -> float:
    """Seconds of the same step, batch and documents included."""
    rows, length = int(row["micro_batch"]), int(row["seq_len"])
    knobs: dict[str, Any] = {name: row[name] for name in KNOBS}
    knobs |= {"attention": "varlen", "packing": True, "compile": True, "micro_batch": rows}
    pins: dict[str, Any] = read_pins(knobs)
    strategy, model = Strategy(**pins), builtin(row["model"])
    batch = Batch(
        rows=rows, length=length, num_targets=int(row["num_targets"]),
        documents=tuple(map(int, row["documents"].split())),
    )  # fmt: skip
    few = few_layers(model, strategy, length)
    passes = Passes(steady(few.model, few.strategy, batch, times=few.times), few.times)
    hardware = load_hardware("h200-sxm")
    seconds = time_of(passes, strategy, model, hardware, captured=True).step_s
    assert seconds is not None
    return seconds


def test_the_gpus_time_of_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels alone: the file has nothing of what lies between them. OPT's dropouts are hashed since."""
    monkeypatch.setattr(kernels, "GRAPH_GAP_S", 0.0)
    monkeypatch.setattr(kernels, "GRAPH_RESET_S", 0.0)
    with FILE.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["model"].startswith("opt")]
    assert len(rows) == 19
    errors = [planned_s(row) / sum(float(row[name]) for name in CLASSES) - 1 for row in rows]
    assert fmean(map(abs, errors)) < 0.045
    assert max(map(abs, errors)) < 0.085
