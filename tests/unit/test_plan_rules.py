"""The rules of thumb that a plan has to find by itself, and the host's memory as a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import sftplan.api
from sftplan.cli.main import run
from sftplan.errors import ExitCode
from sftplan.plan.file import read_plan

if TYPE_CHECKING:
    from pathlib import Path

SMALL_HOST = """
name = "small-host"
[gpu]
nvml_name = "NVIDIA GeForce RTX 4090"
memory_bytes = 25_757_220_864
hbm_bytes_per_s = 1.008e12
bf16_flops_per_s = 1.652e14
fp32_flops_per_s = 8.26e13
pcie_bytes_per_s = 3.2e10
[host]
memory_bytes = 68_719_476_736
num_cpus = 16
"""
# Weights and gradients in fp32, rows padded, all logits at once: what transformers' Trainer does.
AS_IT_COMES: dict[str, Any] = {
    "precision": "bf16-mixed", "packing": False, "compile": False, "loss": "full", "micro_batch": 8,
}  # fmt: skip


def test_gpt2_large_on_one_80_gb_card_needs_neither_zero_nor_checkpointing() -> None:
    plan = sftplan.api.plan(model="gpt2-large", seq_len=1024, hardware="h100-sxm", command=[])

    assert plan.verdict == "fits"
    assert plan.strategy.zero == 0
    assert (plan.strategy.checkpointing, plan.strategy.offload) == ("none", "none")


def test_gpt2_large_as_transformers_trains_it_needs_one_of_them_on_two_24_gb_cards() -> None:
    job = {"model": "gpt2-large", "seq_len": 1024, "hardware": "rtx-4090", "gpus": 2}
    wanted: dict[str, Any] = {**job, **AS_IT_COMES}
    plan = sftplan.api.plan(**wanted, command=[])
    neither = sftplan.api.plan(**wanted, command=[], zero=0, checkpointing="none", offload="none")

    assert plan.fits
    assert plan.strategy.zero > 0 or plan.strategy.checkpointing != "none"
    assert not neither.fits


def test_some_layers_are_checkpointed_where_that_is_all_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job: dict[str, Any] = {
        "model": "gpt2-large", "seq_len": 1024, "hardware": "l4", "command": []
    }  # fmt: skip
    chosen = sftplan.api.plan(**job)
    kind, layers = chosen.strategy.checkpointing, chosen.strategy.checkpointed_layers
    assert layers is not None
    shape: dict[str, Any] = {
        name: getattr(chosen.strategy, name)
        for name in ("precision", "offload", "loss", "compile", "micro_batch", "accumulation")
    }
    every, fewer = (
        sftplan.api.plan(**job, **shape, checkpointing=kind, checkpointed_layers=number)
        for number in (None, layers - 1)
    )

    assert chosen.verdict == every.verdict == "fits"
    assert fewer.strategy.checkpointed_layers == layers - 1  # pinned, too few to leave the margin
    assert fewer.verdict != "fits"
    assert (chosen.time.step_s or 0.0) < (every.time.step_s or 0.0)
    asked = ["plan", "--model", "gpt2-large", "--seq", "1024", "--hardware", "l4"]
    run([*asked, "--out", str(tmp_path / "plan.json")])
    screen = " ".join(capsys.readouterr().out.split())
    assert f"{kind} checkpointing of {layers} layers, {kind.lighter} of the others" in screen
    assert read_plan(tmp_path / "plan.json").strategy.checkpointed_layers == layers


def test_7b_on_one_24_gb_card_offloads_and_says_how_slow_that_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["plan", "--model", "llama-2-7b", "--hardware", "rtx-4090", "--seq", "1024", "--no-out"]
    assert run(asked) == ExitCode.OK
    screen = capsys.readouterr().out
    plan = sftplan.api.plan(model="llama-2-7b", seq_len=1024, hardware="rtx-4090", command=[])

    assert plan.strategy.offload != "none"
    assert "offload" in screen
    assert plan.time.step_s is not None
    assert plan.time.offload_s is not None
    assert plan.time.offload_s > 1  # 13.5 GB of weights, 84 GB of states on a desktop's memory
    assert f"{plan.time.step_s:.2f} s per step" in screen


@pytest.fixture
def small_host(tmp_path: Path) -> list[str]:
    """7 B on 24 GB beside 64 GiB: what the offload would need is not there."""
    (tmp_path / "host.toml").write_text(SMALL_HOST)
    return ["--model", "llama-2-7b", "--hardware", str(tmp_path / "host.toml"), "--seq", "1024"]


def test_a_host_too_small_for_the_offload_is_refused_with_both_figures(
    small_host: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *small_host, "--no-out"]) == ExitCode.INFEASIBLE
    chosen = " ".join(capsys.readouterr().out.split())
    assert run(["plan", *small_host, "--no-out", "--offload", "all"]) == ExitCode.INFEASIBLE
    pinned = capsys.readouterr().out

    assert "GiB of host memory per node, 64.00 GiB are there" in chosen
    assert "Does not fit: 176.68 of 64.00 GiB of host memory per node, 112.68 GiB over" in pinned


def test_launch_refuses_it_before_anything_starts(
    small_host: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    run(["plan", *small_host, "--offload", "all", "--out", str(plan)])
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    data, out = tmp_path / "data.jsonl", tmp_path / "r"
    capsys.readouterr()

    assert run(["launch", str(plan), "--data", str(data), "--out", str(out)]) == ExitCode.INFEASIBLE
    assert "176.68 GiB of host memory, 64.00 are there" in capsys.readouterr().err
    assert not out.exists()
