"""Memory of our own training step, planned against measured on an H200: the bars of the project.

The rows of one half were looked at while the tape of compiled steps was written, those of the other were not.
"""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from sftplan.cost.evaluate import Evaluator
from sftplan.facts.catalogue import builtin
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Strategy
from sftplan.facts.workload import LengthStatistics, Workload
from sftplan.plan.request import read_pins

HERE = Path(__file__).parent
KNOBS = ("precision", "checkpointing", "attention", "loss", "allocator")


@cache
def _lengths(seq_len: str) -> LengthStatistics:
    """Of the packed examples: `lengths_of` of tests/bench/verify_cases.py."""
    found: dict[str, Any] = json.loads((HERE / "h200_verify_lengths.json").read_text())[seq_len]
    return LengthStatistics(
        **{k: _tuples(v) if isinstance(v, list) else v for k, v in found.items()}
    )


def _tuples(pairs: list[list[int]]) -> Any:
    return tuple(map(tuple, pairs))


def _errors(row: dict[str, str]) -> tuple[float, float]:
    model, seq_len = builtin(row["model"]), int(row["seq_len"])
    knobs = {name: row[name] for name in KNOBS} | {"zero": 0, "offload": "none"}
    knobs |= {name: row[name] == "True" for name in ("packing", "compile")}
    knobs |= {name: int(row[name]) for name in ("micro_batch", "accumulation")}
    pins: dict[str, Any] = read_pins(knobs)
    strategy = Strategy(**pins)
    rows = strategy.micro_batch * strategy.accumulation
    workload = Workload(
        seq_len=seq_len, global_batch=rows, global_batch_pinned=True,
        lengths=_lengths(row["seq_len"]) if strategy.packing else None,
    )  # fmt: skip
    evaluator = Evaluator(model, workload, num_gpus=1, gpus_per_node=1)
    memory = evaluator.estimate(strategy, load_hardware("h200-sxm")).memory
    return (
        memory.peak_allocated_bytes / int(row["allocated"]) - 1,
        memory.peak_reserved_bytes / int(row["reserved"]) - 1,
    )


@pytest.mark.slow
def test_memory_is_within_the_bars() -> None:
    with (HERE / "h200_verify.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) >= 60
    allocated, reserved = zip(*(_errors(row) for row in rows), strict=True)
    for errors in (allocated, reserved):
        assert mean(map(abs, errors)) <= 0.01
    assert max(map(abs, allocated)) <= 0.01
    assert max(map(abs, reserved)) <= 0.03
