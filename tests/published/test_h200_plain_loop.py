"""The tape against steps measured on an H200.

No constant was fitted to `h200_plain_loop.csv`, but its rows were looked at while the tape was
written; `h200_fresh.csv` was measured afterwards, in other models, lengths and batches.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

from sftplan.cost.allocator import replay
from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Attention, Checkpointing, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.few import few_layers
from sftplan.step.repeat import expand
from sftplan.step.simulate import simulate

HERE = Path(__file__).parent


def _errors(row: dict[str, str]) -> tuple[float, float]:
    model, length = builtin(row["model"]), int(row["seq_len"])
    strategy = Strategy(
        precision=Precision(row["precision"]),
        checkpointing=Checkpointing(row["checkpointing"]),
        attention=Attention(row["attention"]),
        micro_batch=int(row["micro_batch"]),
        accumulation=int(row["accumulation"]),
        attention_dropout="model",
        max_grad_norm=float(row["max_grad_norm"]),
    )
    few = few_layers(model, strategy, length)
    batch = Batch(rows=strategy.micro_batch, length=length, num_targets=0)
    tape = simulate(few.model, few.strategy, batch, times=few.times)
    events = expand(tape, few.times)
    peak = replay(events.events, events.sizes, expandable=row["allocator"] == "expandable")
    return (
        peak.peak_allocated_bytes / int(row["peak_allocated_bytes"]) - 1,
        peak.peak_reserved_bytes / int(row["peak_reserved_bytes"]) - 1,
    )


def _rows(name: str) -> list[dict[str, str]]:
    with (HERE / name).open() as file:
        return list(csv.DictReader(file))


def test_peaks_are_those_that_were_measured() -> None:
    rows = _rows("h200_plain_loop.csv")
    errors = {(r["allocator"], i): _errors(r) for i, r in enumerate(rows)}
    allocated = [abs(a) for a, _ in errors.values()]
    default = [abs(r) for (kind, _), (_, r) in errors.items() if kind == "default"]
    expandable = [r for (kind, _), (_, r) in errors.items() if kind == "expandable"]

    assert len(rows) == 48
    assert mean(allocated) <= 0.002
    assert max(allocated) <= 0.02
    assert mean(default) <= 0.015
    assert max(default) <= 0.08
    assert mean(map(abs, expandable)) <= 0.01
    assert max(map(abs, expandable)) <= 0.03
    assert min(expandable) >= -0.01


def test_peaks_of_cases_that_nothing_was_written_by() -> None:
    rows = _rows("h200_fresh.csv")
    errors = [_errors(row) for row in rows]
    allocated, reserved = ([abs(pair[i]) for pair in errors] for i in (0, 1))

    assert len(rows) == 30
    assert mean(allocated) <= 0.001
    assert max(allocated) <= 0.002
    assert mean(reserved) <= 0.01
    assert max(reserved) <= 0.05
