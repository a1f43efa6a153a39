"""The Python API with a search that answers at once: what it checks, resolves and hands on."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import sftplan
from sftplan.cost.estimate import Compute, Estimate, GpuMemory, HostMemory, StepTime
from sftplan.errors import NotReadyError, UsageError
from sftplan.facts.strategy import Attention, Precision, Strategy
from sftplan.units import GIB

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class FakeChoice:
    strategy: Strategy
    estimate: Estimate
    verdict: str = "fits"
    host_needed_bytes: int | None = None
    neighbours: tuple[Any, ...] = ()
    remedies: tuple[Any, ...] = ()
    reasons: tuple[tuple[str, str], ...] = (("precision", "tensor cores"),)


def estimate(rows: int, seq_len: int, used: int = 20 * GIB) -> Estimate:
    """One second a step, whatever it is."""
    return Estimate(
        memory=GpuMemory(
            peak_allocated_bytes=used - GIB,
            peak_reserved_bytes=used,
            context_bytes=GIB // 2,
            used_bytes=used + GIB // 2,
            capacity_bytes=140 * GIB,
            peak_at="loss",
            by_category={"weights": used - GIB},
        ),
        host=HostMemory(peak_bytes=GIB),
        compute=Compute(
            flops_per_token=5_000_000_000,
            linear_flops_per_token=4_000_000_000,
            attention_flops_per_token=1_000_000_000,
            step_flops=5_000_000_000 * rows * seq_len,
        ),
        time=StepTime(
            step_s=1.0,
            compute_s=0.9,
            memory_s=0.1,
            dispatch_s=0.0,
            communication_s=0.0,
            offload_s=0.0,
            optimizer_s=0.0,
            startup_s=10.0,
        ),
        tokens_per_step=rows * seq_len,
        examples_per_step=rows,
        rows_per_step=rows,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the search was asked, which answers every question with one strategy."""
    seen: dict[str, Any] = {}

    def choose(model: Any, hardware: Any, workload: Any, pins: Any, **options: Any) -> FakeChoice:
        seen.update(model=model, hardware=hardware, workload=workload, pins=pins, **options)
        strategy = Strategy(**{k: v for k, v in pins.items() if k != "global_batch"})
        return FakeChoice(strategy, estimate(workload.global_batch, workload.seq_len))

    module = ModuleType("sftplan.search.choose")
    module.choose = choose  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sftplan.search.choose", module)
    return seen


def make(**request: Any) -> Any:
    """A plan of gpt2-large on an H200, as far as `request` does not say otherwise."""
    return sftplan.plan(
        **{"model": "gpt2-large", "seq_len": 1024, "hardware": "h200-sxm", **request}
    )


def test_pins_reach_the_search_in_their_types(asked: dict[str, Any]) -> None:
    plan = make(precision="bf16-master", zero=2, packing=True, margin=0.1, minimize="memory")

    assert asked["pins"] == {"precision": Precision.BF16_MASTER, "zero": 2, "packing": True}
    assert (asked["margin"], asked["minimize"]) == (0.1, "memory")
    assert plan.strategy.pinned == ["precision", "zero", "packing"]
    assert plan.inputs.model.num_parameters == 774_030_080


def test_the_default_batch_is_64_and_said(asked: dict[str, Any]) -> None:
    plan = make()

    assert asked["workload"].global_batch == 64
    assert not asked["workload"].global_batch_pinned
    assert any("--global-batch" in text for text in plan.assumptions)


def test_micro_batch_and_accumulation_fix_the_batch(asked: dict[str, Any]) -> None:
    plan = make(gpus=2, micro_batch=2, accumulation=3)

    assert plan.inputs.workload.global_batch == 2 * 3 * 2
    assert asked["workload"].global_batch_pinned


@pytest.mark.parametrize(
    ("amount", "steps"),
    [
        ({"tokens": 65_536 * 10}, 10),
        ({"tokens": 65_536 * 10 + 1}, 11),
        ({"examples": 640, "epochs": 1.5}, 15),
        ({}, None),
    ],
)
def test_steps_round_up(asked: dict[str, Any], amount: dict[str, Any], steps: int | None) -> None:
    plan = make(**amount)

    assert plan.time.num_steps == steps
    assert plan.time.total_s == (None if steps is None else 10.0 + steps)


def test_utilization_is_of_the_dense_peak_over_all_gpus(asked: dict[str, Any]) -> None:
    plan = make(gpus=2)

    peak = plan.inputs.hardware.gpu.bf16_flops_per_s
    assert plan.time.mfu_fraction == pytest.approx(5e9 * 65_536 / (2 * peak))


def test_categories_add_up_and_are_all_there(asked: dict[str, Any]) -> None:
    gpu = make().memory.gpu

    assert sum(gpu.by_category.values()) == gpu.peak_allocated_bytes
    assert {"weights", "gradients", "optimizer", "activations"} < set(gpu.by_category)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"seq_len": 0}, "--seq 0 has to be at least 1"),
        ({"seq_len": -5}, "--seq -5 has to be at least 1"),
        ({"seq_len": 2048}, "--seq 2,048 is 1,024 more than the 1,024 positions of gpt2-large"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"hardware": "no-such-gpu"}, "no-such-gpu"),
        ({"micro_batch": 0}, "--micro-batch 0 has to be at least 1"),
        ({"accumulation": -1}, "--accumulation -1 has to be at least 1"),
        ({"gpus": 0}, "--gpus 0 has to be at least 1"),
        ({"nodes": 0}, "--nodes 0 has to be at least 1"),
        ({"global_batch": 0}, "--global-batch 0 has to be at least 1"),
        ({"tokens": 0}, "--tokens 0 has to be at least 1"),
        ({"examples": -1}, "--examples -1 has to be at least 1"),
        ({"tokens": 1, "examples": 1}, "--tokens and --examples"),
        ({"epochs": float("nan")}, "--epochs nan"),
        ({"epochs": 0}, "--epochs 0"),
        ({"margin": 1.0}, "--margin 1 has to be at least 0 and below 1"),
        ({"margin": -0.1}, "--margin -0.1"),
        ({"max_grad_norm": -1}, "--max-grad-norm -1"),
        ({"attention_dropout": 1.5}, "--attention-dropout 1.5"),
        ({"zero": 4}, "--zero 4 is none of 0, 1, 2, 3"),
        ({"precision": "bf16"}, "--precision 'bf16' is none of"),
        ({"minimize": "joy"}, "--minimize 'joy'"),
        ({"attention": "varlen", "precision": "fp32"}, "varlen needs 16-bit products"),
        ({"attention": "varlen", "attention_dropout": "model"}, "varlen has no dropout"),
        ({"data": "missing.jsonl"}, "no file or folder missing.jsonl"),
        ({"batch_size": 3}, "no knob 'batch_size'"),
        (
            {"global_batch": 10, "micro_batch": 2, "accumulation": 3},
            "--global-batch 10 is not micro-batch 2 x accumulation 3 x 1 GPU = 6",
        ),
        ({"global_batch": 10, "gpus": 4}, "--global-batch 10 cannot be split over 4 GPUs"),
    ],
)
def test_what_cannot_be_planned_for_is_a_usage_error(
    asked: dict[str, Any], request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make(**request_)


def test_rotary_models_have_a_longest_sequence_too(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"positions of tinyllama-1\.1b"):
        make(model="tinyllama-1.1b", seq_len=4096)


def test_without_a_gpu_the_reference_is_planned_for_and_said(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("sftplan.detect.gpus")

    def detect() -> Any:
        message = "no driver"
        raise NotReadyError(message)

    module.detect = detect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sftplan.detect.gpus", module)

    plan = make(hardware=None)
    assert plan.inputs.hardware.name == "h200-sxm"
    assert "no GPU here" in plan.assumptions[0]
    with pytest.raises(NotReadyError, match="no driver"):
        make(hardware="auto")


def test_compare_has_a_row_per_machine_and_sorts(asked: dict[str, Any]) -> None:
    comparison = sftplan.compare(
        model="gpt2-large", seq_len=1024, on=["h200-sxm", "a100-80gb-sxm"], sort="name"
    )

    assert [row.hardware for row in comparison.rows] == ["a100-80gb-sxm", "h200-sxm"]
    assert comparison.rows[0].fits


def test_compare_over_all_offers_sorts_by_cost(asked: dict[str, Any]) -> None:
    comparison = sftplan.compare(model="gpt2-large", seq_len=1024, tokens=20_000_000)

    costs = [row.usd for row in comparison.rows if row.fits and row.usd is not None]
    assert len(comparison.rows) > 100
    assert costs == sorted(costs)


def test_an_offer_that_cannot_be_resized_is_a_row_with_its_reason(asked: dict[str, Any]) -> None:
    comparison = sftplan.compare(model="gpt2-large", seq_len=1024, gpus=8)

    reasons = [row.reason for row in comparison.rows if not row.fits]
    assert reasons
    assert all(reasons)


def test_names_of_the_api_are_functions_however_they_were_imported(asked: dict[str, Any]) -> None:
    from sftplan.plan.record import FORMAT  # rebinds sftplan.plan to the package

    assert callable(sftplan.plan)
    assert make(attention="sdpa").strategy.attention is Attention.SDPA
    assert FORMAT == "sftplan.plan"
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        _ = sftplan.plam


def test_a_plan_survives_its_file(asked: dict[str, Any], tmp_path: Path) -> None:
    from sftplan.plan.file import read_plan, write_plan

    plan = make(attention="sdpa")
    write_plan(plan, tmp_path / "plan.json")

    assert read_plan(tmp_path / "plan.json") == plan


def test_a_pin_that_the_gpu_emulates_is_warned_of() -> None:
    request: dict[str, Any] = {"model": "gpt2", "seq_len": 512, "hardware": "t4", "command": ["x"]}
    said = "T4 has no bf16 of its own, products are emulated: `--precision fp16-mixed`"

    assert said in sftplan.api.plan(**request, precision="bf16-mixed").warnings
    chosen = sftplan.api.plan(**request)
    assert chosen.strategy.precision == "fp16-mixed"
    assert said not in chosen.warnings
