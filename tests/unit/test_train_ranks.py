"""Ranks on the processor train as one process does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import sftplan.api
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import TrainingFailedError
from sftplan.train import ranks
from sftplan.train.demo import DEMO_KNOBS, DEMO_SETTINGS, write_demo_model
from sftplan.train.job import Job, write_job
from sftplan.train.launch import start
from sftplan.train.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

from demo_run import SAME, lines


def without_dropout(folder: Path, *, gpus: int, accumulation: int) -> Plan:
    """A plan for the demo's model, so many rows per rank that a step is always the same."""
    write_demo_model(folder)
    config = json.loads((folder / "config.json").read_text()) | {"resid_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    knobs = DEMO_KNOBS | {"accumulation": accumulation, "epochs": 1.0}
    return sftplan.api.plan(
        model=str(folder), seq_len=256, hardware="h200-sxm", gpus=gpus, command=[], **knobs
    )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of the rows; losses and norms are those of one process with all of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = Settings(**DEMO_SETTINGS | {"eval_every": 5})
    runs = {}
    for count in (1, 2):
        plan = without_dropout(tmp_path / "model", gpus=count, accumulation=2 // count)
        out = tmp_path / f"run-{count}"
        job = Job(plan=plan, data=str(DEMO_FILE), out=out, settings=settings, quiet=True)
        assert start(job, ranks=count)["status"] == "done"
        runs[count] = lines(out)

    assert len(runs[1]) == len(runs[2]) == 10
    for alone, together in zip(runs[1], runs[2], strict=True):
        for key in (*SAME, *(("eval_loss",) if "eval_loss" in alone else ())):
            assert together[key] == pytest.approx(alone[key], rel=1e-4), key
    assert "eval_loss" in runs[2][-1]


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data goes between the check and the start: every rank fails, and none is left behind."""
    monkeypatch.setattr(ranks, "GRACE_S", 30.0)
    plan = without_dropout(tmp_path / "model", gpus=2, accumulation=1)
    settings = Settings(**DEMO_SETTINGS)
    out = tmp_path / "run"
    write_job(Job(plan=plan, data=str(tmp_path / "gone.jsonl"), out=out, settings=settings))

    with pytest.raises(TrainingFailedError, match="rank 0 ended with code 2; its message is above"):
        ranks.run_ranks(out, 2)
    assert "gone.jsonl" in (out / "logs" / "rank-1.log").read_text()
