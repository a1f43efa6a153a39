"""What the host takes for a layer, formula against table: narrow steps on the hosts of two H200."""

from __future__ import annotations

import csv
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from sftplan.cost.device import device_of
from sftplan.cost.passes import Passes
from sftplan.facts.catalogue import builtin
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Checkpointing, Loss, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.few import few_layers
from sftplan.step.repeat import MIDDLE
from sftplan.step.simulate import steady

HERE = Path(__file__).parent
REFERENCE = load_hardware("h200-sxm")  # whose host is the reference
TWICE = 2  # the layer in the middle, to be told apart


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
    few = few_layers(model, strategy, 512)
    tape = steady(few.model, few.strategy, Batch(rows=2, length=512, num_targets=0))
    passes = Passes(tape, {MIDDLE: TWICE})
    segments = passes.priced(device_of(REFERENCE), drops=False, captured=False)[-1].segments
    return {each.phase: each.host_s for each in segments if each.times == TWICE}


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_layers_dispatch_is_known(phase: str) -> None:
    errors = [_predicted(*case)[phase] / row[phase] - 1 for case, row in _table().items()]

    assert len(errors) == 26
    assert mean(map(abs, errors)) < 0.065
    assert abs(mean(errors)) < 0.02
    assert max(map(abs, errors)) < 0.15
