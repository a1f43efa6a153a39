"""The dry run in fresh processes: what it measures on a processor, and that nothing is left behind."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

import sftplan.api
from sftplan.errors import DriftError, NotReadyError, UsageError
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Optimizer
from sftplan.train.demo import DEMO_KNOBS, DEMO_SEQ_LEN
from sftplan.units import GIB
from sftplan.verify import occupancy, profile, rehearse
from sftplan.verify.live import timeline_of
from sftplan.verify.phases import Clock, phase_seconds

if TYPE_CHECKING:
    from sftplan.plan.record import Plan
DATA = str(DEMO_KNOBS["data"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("data", [None, DATA])
def test_a_dry_run_on_the_processor_times_every_phase(demo: Plan, data: str | None) -> None:
    found = profile.measure_here(demo, cpu=True, steps=3, data=data)

    assert len(found["step_seconds"]) == 3
    assert set(found["phase_s"]) == {"data", "forward", "backward", "optimizer"}
    assert sum(found["phase_s"].values()) == pytest.approx(found["step_s"], rel=0.3)
    assert found["first_step_s"] > 0
    assert found["tokens_per_s"] > 0
    assert found["host_peak_bytes"] > 100 * 2**20  # torch alone is larger
    assert found["peak_allocated_bytes"] is None  # unknown is no zero
    assert found["mfu_fraction"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert found["loss"] == pytest.approx(6.2, abs=0.5)  # ln of the vocabulary: nothing is learned


def test_a_clock_counts_all_passes_and_leaves_the_first_step_out() -> None:
    clock = Clock(torch.device("cpu"))
    for start in (0.0, 10.0, 20.0):
        clock.begin(0.5)
        times = iter([start, start + 1, start + 3, start + 4, start + 6, start + 7])
        phases = ("forward", "backward", "forward", "backward", "optimizer", "end")
        for phase, at in zip(phases, times, strict=True):
            clock.steps[-1].append((phase, at))

    assert clock.step_seconds() == [10.0, 10.0]
    assert phase_seconds([clock]) == {
        "data": 0.5,
        "forward": 2.0,
        "backward": 4.0,
        "optimizer": 1.0,
    }


def test_a_recorded_step_is_told_apart_by_what_its_blocks_are_for() -> None:
    trace = [
        {"action": "alloc", "addr": 1, "size": 10},  # an activation
        {"action": "segment_map", "addr": 0, "size": 99},
        {"action": "alloc", "addr": 2, "size": 5},  # temporary
        {"action": "free_completed", "addr": 1, "size": 10},
        {"action": "alloc", "addr": 1, "size": 7},  # the same place: a gradient now
        {"action": "free_completed", "addr": 2, "size": 5},
        {"action": "alloc", "addr": 3, "size": 1},  # the optimizer's
        {"action": "free_completed", "addr": 77, "size": 2},  # was there before
    ]
    marks = [(0, "forward"), (1, "backward"), (3, "optimizer"), (4, "end")]
    found = timeline_of(trace, {"weights": 100, "other": 3}, marks, frozenset({1}))
    series = {
        name: [point[n] for point in found["points"]] for n, name in enumerate(found["categories"])
    }

    assert series["weights"] == [100] * 8
    assert series["activations"] == [0, 10, 10, 0, 0, 0, 0, 0]
    assert series["temporary"] == [0, 0, 5, 5, 5, 0, 1, 1]
    assert series["gradients"] == [0, 0, 0, 0, 7, 7, 7, 7]
    assert series["other"] == [3] * 7 + [1]
    assert found["phases"] == [[0, "forward"], [1, "backward"], [4, "optimizer"], [6, "end"]]


def test_another_process_is_noticed_by_what_is_gone() -> None:
    steady = {"outside_bytes": 5 * GIB, "outside_later_bytes": 5 * GIB + 2**20}
    crowded = {"outside_bytes": GIB, "outside_later_bytes": 4 * GIB}

    assert occupancy.taken_meanwhile((0, 0), (2**20, 0), [steady]) is None
    assert occupancy.taken_meanwhile((0, 0), (0, 2 * GIB), [steady]) == 2 * GIB
    assert occupancy.taken_meanwhile(None, None, [steady, crowded]) == 3 * GIB


def test_without_a_gpu_both_ways_on_are_named(demo: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        message = "no NVIDIA driver is installed"
        raise NotReadyError(message, "x")

    monkeypatch.setattr(profile, "detect", nothing)
    with pytest.raises(NotReadyError) as caught:
        profile.measure_here(demo)

    assert "--no-gpu" in str(caught.value.hint)
    assert "where the GPU is" in str(caught.value.hint)


def test_a_rehearsal_leaves_what_the_small_card_has(
    demo: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_hardware("rtx-4090")
    knobs = {name: value for name, value in DEMO_KNOBS.items() if name not in ("data", "epochs")}
    plan = sftplan.api.plan(
        model=demo.inputs.model.source, seq_len=64, hardware="rtx-4090", command=["x"], **knobs
    )
    gpu = small.gpu
    idle = max(gpu.unusable_bytes, small.rates.device_bytes)

    assert (
        rehearse.cap_bytes(plan, "rtx-4090") == gpu.memory_bytes - idle - small.rates.context_bytes
    )
    with pytest.raises(UsageError, match="not for"):
        rehearse.cap_bytes(plan, "t4")
    rehearse.check_larger(plan, load_hardware("h200-sxm"))
    with pytest.raises(DriftError, match="a rehearsal of"):
        rehearse.check_larger(plan, load_hardware("t4"))


def test_a_sharded_plan_is_rehearsed(demo: Plan, one_thread: None) -> None:
    sharded = sftplan.api.plan(
        model=demo.inputs.model.source, seq_len=DEMO_SEQ_LEN, hardware="h200-sxm", gpus=1,
        command=["x"], zero=2, micro_batch=2, global_batch=4, compile=False,
    )  # fmt: skip
    found = profile.measure_here(sharded, cpu=True, steps=2)

    assert found["step_s"] > 0


def test_a_rehearsal_has_as_many_processes_as_the_plan_has_gpus(
    demo: Plan, one_thread: None
) -> None:
    plan = sftplan.api.plan(
        model=demo.inputs.model.source, seq_len=DEMO_SEQ_LEN, hardware="h200-sxm", gpus=2,
        command=["x"], zero=0, offload="none", micro_batch=2, accumulation=1, compile=False,
    )  # fmt: skip
    alone = profile.measure_here(demo, cpu=True, steps=1)
    found = profile.measure_here(plan, cpu=True, steps=1)

    assert "communication" in found["phase_s"]
    assert found["host_peak_bytes"] > 1.5 * alone["host_peak_bytes"]


def test_the_error_of_a_child_is_the_error_of_the_dry_run(
    demo: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = replace(demo.strategy, zero=2, optimizer=Optimizer.ADAMW_8BIT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UsageError, match="cannot be sharded by --zero 2"):
        profile.measure_here(replace(demo, strategy=strategy), cpu=True, steps=1)
