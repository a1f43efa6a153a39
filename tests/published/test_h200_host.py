"""What the host takes for a layer, formula against table: narrow steps on one H200's host."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from sftplan.cost.dispatch import backward_s, forward_s
from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Checkpointing, Loss, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.repeat import MIDDLE
from sftplan.step.simulate import few_layers, steady

HERE = Path(__file__).parent


@cache
def _table() -> dict[tuple[str, str, str], dict[str, float]]:
    """Mean seconds of both runs; selective checkpointing is left out, two cases and far apart."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    with (HERE / "h200_host.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["checkpointing"] != "selective":
                case = row["model"], row["precision"], row["checkpointing"]
                found[case].append({p: float(row[f"{p}_s"]) for p in ("forward", "backward")})
    return {case: {p: mean(r[p] for r in rows) for p in rows[0]} for case, rows in found.items()}


def _predicted(model_name: str, precision: str, checkpointing: str) -> dict[str, float]:
    strategy = Strategy(
        micro_batch=2, precision=Precision(precision), loss=Loss.FULL,
        checkpointing=Checkpointing(checkpointing),
    )  # fmt: skip
    model = builtin(model_name)
    tape = steady(
        few_layers(model, 512) or model, strategy, Batch(rows=2, length=512, num_targets=0)
    )
    seconds = {}
    for (label, works), hosts in zip(tape.works, tape.hosts, strict=True):
        phase, _, layer = label.partition(" ")
        if layer == str(MIDDLE):
            counts: Counter[str] = hosts
            kernels = sum(works.values())
            seconds[phase] = (
                forward_s(counts) if phase == "forward" else backward_s(counts, kernels)
            )
    return seconds


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_layers_dispatch_is_known(phase: str) -> None:
    errors = [_predicted(*case)[phase] / row[phase] - 1 for case, row in _table().items()]

    assert len(errors) == 26
    assert mean(map(abs, errors)) < 0.065
    assert abs(mean(errors)) < 0.02
    assert max(map(abs, errors)) < 0.15
