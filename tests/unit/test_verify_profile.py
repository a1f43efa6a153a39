"""The dry run in fresh processes: what it measures on a processor, and that nothing is left behind."""

# ruff: noqa: TID253
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sftplan.api
from sftplan.cost.memory import BUILDING
from sftplan.errors import DriftError, NotReadyError, TrainingFailedError, UsageError
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Optimizer
from sftplan.facts.workload import LengthStatistics
from sftplan.train.demo import DEMO_KNOBS, DEMO_SEQ_LEN, write_demo_model
from sftplan.train.inputs import to_device
from sftplan.verify import occupancy, processes, profile, rehearse, run
from sftplan.verify.judge import judge
from sftplan.verify.live import timeline_of
from sftplan.verify.phases import Clock, phase_seconds
from sftplan.verify.processes import run_processes
from sftplan.verify.read import measurement_of
from sftplan.verify.request import Request
from sftplan.verify.worst import drawn_lengths, made_up_batches, worst_micro_batch

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

GIB = 2**30
DATA = str(DEMO_KNOBS["data"])


def lengths(**changes: Any) -> LengthStatistics:
    """Statistics of some data."""
    fields: dict[str, Any] = {
        "source": "x", "num_examples": 100, "num_dropped": 0, "prompt_mean_tokens": 20.0,
        "response_mean_tokens": 60.0, "total_mean_tokens": 80.0, "total_max_tokens": 200,
        "total_p50_tokens": 70, "total_p95_tokens": 180,
        "packed_fill_fraction": 0.9, "estimated": False, "tokenizer": "x",
        "histogram": ((50, 30), (100, 50), (200, 20)),
    }  # fmt: skip
    return LengthStatistics(**(fields | changes))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the demo's model, without statistics of any data."""
    folder = tmp_path_factory.mktemp("model")
    write_demo_model(folder)
    knobs = {name: value for name, value in DEMO_KNOBS.items() if name not in ("data", "epochs")}
    return sftplan.api.plan(
        model=str(folder), seq_len=DEMO_SEQ_LEN, hardware="h200-sxm", gpus=1, command=["x"], **knobs
    )


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


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


def test_rows_are_full_where_no_lengths_are_known(demo: Plan) -> None:
    found = made_up_batches(demo, num_steps=5, world_size=2)
    worst = worst_micro_batch(found)

    assert found.num_steps >= 5
    assert worst.num_tokens == len(worst.input_ids) == 2 * DEMO_SEQ_LEN
    assert worst.num_targets == 2 * (DEMO_SEQ_LEN - 1)
    assert found.step(0, 0).num_tokens == 2 * 2 * 2 * DEMO_SEQ_LEN  # rows, passes, ranks


@pytest.mark.parametrize("packing", [False, True])
def test_rows_follow_the_lengths_of_the_data(demo: Plan, packing: bool) -> None:
    work = replace(demo.inputs.workload, lengths=lengths())
    plan = replace(
        demo,
        inputs=replace(demo.inputs, workload=work),
        strategy=replace(demo.strategy, packing=packing),
    )
    found = made_up_batches(plan, num_steps=2, world_size=1)
    totals = [len(example) for example in found.examples]

    assert max(totals) == 200
    assert sum(totals) / len(totals) == pytest.approx(80, rel=0.25)
    assert all(e.num_trained == pytest.approx(0.75 * len(e), abs=1.1) for e in found.examples)
    assert found.row_len == (DEMO_SEQ_LEN if packing else 256)  # 200 up to a multiple of 64


def test_every_step_is_as_full_as_the_data_makes_them(demo: Plan) -> None:
    work = replace(demo.inputs.workload, lengths=lengths())
    strategy = replace(demo.strategy, packing=True)
    plan = replace(demo, inputs=replace(demo.inputs, workload=work), strategy=strategy)
    found = made_up_batches(plan, num_steps=4, world_size=2)
    tokens = [step.num_tokens for step in found.steps()]

    assert len(tokens) >= 4
    assert len(found.rows) == found.steps_per_epoch * found.sharing.rows_per_step
    assert min(tokens) > 0.85 * found.sharing.rows_per_step * DEMO_SEQ_LEN


@pytest.mark.usefixtures("one_thread")
def test_the_worst_batch_has_the_shape_of_all_steps(
    demo: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured pass is replayed at one shape only."""
    work = replace(demo.inputs.workload, lengths=lengths())
    strategy = replace(demo.strategy, packing=True)
    plan = replace(demo, inputs=replace(demo.inputs, workload=work), strategy=strategy)
    seen: list[Any] = []

    def watched(batch: Any, *others: Any) -> Any:
        seen.append(batch.shape)
        return to_device(batch, *others)

    monkeypatch.setattr("sftplan.verify.run.to_device", watched)
    monkeypatch.setattr("sftplan.train.inputs.to_device", watched)
    run.dry_run(plan, Request(steps=2, more_rounds_s=0.01, timeline=False, cpu=True))

    assert len(seen) > 4
    assert len(set(seen)) == 1


def test_drawn_lengths_stay_in_the_bins_and_below_the_sequence() -> None:
    drawn = drawn_lengths(lengths(), 500, longest=120)

    assert max(drawn) == 120
    assert drawn == drawn_lengths(lengths(), 500, longest=120)
    assert sum(n <= 50 for n in drawn) == pytest.approx(150, abs=40)


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


FAKE = """
import json, os, subprocess, sys, time
from pathlib import Path
from sftplan.verify.child import end_with_parent
from sftplan.verify.request import result_file

folder, rank = Path(sys.argv[-1]), int(os.environ.get("RANK", "0"))
end_with_parent()
grandchild = subprocess.Popen(["sleep", "600"])
(folder / f"pids-{rank}").write_text(f"{os.getpid()} {grandchild.pid}")
what = (folder / f"what-{rank}").read_text()
if what == "oom":
    result_file(folder, rank).write_text(json.dumps({"out_of_memory": {"phase": "backward"}}))
    os._exit(5)
if what == "die":
    print("cause of death", flush=True)
    os._exit(3)
if what == "ok":
    result_file(folder, rank).write_text(json.dumps({"rank": rank}))
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose ranks do what its files say; the module that they run is called `fake_child`."""
    (tmp_path / "fake_child.py").write_text(FAKE)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), before))))
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    return tmp_path


def tell(folder: Path, *what: str) -> None:
    for rank, word in enumerate(what):
        (folder / f"what-{rank}").write_text(word)


def pids(folder: Path) -> list[int]:
    return [int(p) for file in folder.glob("pids-*") for p in file.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process still runs; one that waits to be reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(found: list[int]) -> None:
    """Signals take a moment."""
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in found):
        assert time.monotonic() < deadline, "left running"
        time.sleep(0.05)


def test_all_ranks_end_when_one_runs_out_of_memory(fake: Path) -> None:
    tell(fake, "sleep", "oom")
    results = run_processes(fake, 2, module="fake_child", timeout_s=60)

    assert profile.merged(results) == {"out_of_memory": {"phase": "backward"}}
    assert len(pids(fake)) == 4
    wait_until_gone(pids(fake))


def test_results_come_in_the_order_of_ranks(fake: Path) -> None:
    tell(fake, "ok", "ok")
    assert run_processes(fake, 2, module="fake_child", timeout_s=60) == [{"rank": 0}, {"rank": 1}]
    wait_until_gone(pids(fake))


def test_a_rank_that_dies_is_named_with_its_last_words(fake: Path) -> None:
    tell(fake, "sleep", "die")
    with pytest.raises(TrainingFailedError, match=r"rank 1 .*code 3.*\n.*cause of death"):
        run_processes(fake, 2, module="fake_child", timeout_s=60)
    wait_until_gone(pids(fake))


def test_a_dry_run_that_hangs_is_ended(fake: Path) -> None:
    tell(fake, "sleep")
    said = r'not ended in 4 s; it stood at\nrank 0:\n  File ".*fake_child.py", line \d+ in <module>'
    with pytest.raises(TrainingFailedError, match=said):
        run_processes(fake, 1, module="fake_child", timeout_s=4)
    wait_until_gone(pids(fake))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_process_that_asked(fake: Path, number: int) -> None:
    tell(fake, "sleep")
    code = (
        "import sys; from pathlib import Path; from sftplan.verify.processes import run_processes; "
        "run_processes(Path(sys.argv[1]), 1, module='fake_child', timeout_s=60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(fake)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (fake / "pids-0").exists() or len(pids(fake)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(10)

    wait_until_gone(pids(fake))


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


FOUND = {
    "peak_allocated_bytes": 10 * GIB, "peak_reserved_bytes": 11 * GIB, "used_bytes": 12 * GIB,
    "outside_bytes": GIB, "host_peak_bytes": 3 * GIB, "step_s": 0.5, "tokens_per_s": 1e4,
    "mfu_fraction": 0.4, "first_step_s": 9.5, "phase_s": {"forward": 0.2, "backward": 0.3, "optimizer": 0.1},
    "phase_peak_bytes": {"start": 1, "forward": 9 * GIB, "backward": 10 * GIB}, "versions": {"torch": "2"},
    "timeline": {"categories": ["weights"], "points": [[1], [2]], "phases": [[0, "forward"]]},
}  # fmt: skip


def test_a_result_is_read_under_the_plans_own_keys(demo: Plan) -> None:
    found = measurement_of(demo, FOUND | {"taken_meanwhile_bytes": 2 * GIB})

    assert found.quantities == {
        "memory.gpu.peak_allocated_bytes": 10 * GIB, "memory.gpu.peak_reserved_bytes": 11 * GIB,
        "memory.gpu.used_bytes": 12 * GIB, "memory.gpu.context_bytes": GIB,
        "memory.host.peak_bytes": 3 * GIB, "time.step_s": 0.5, "time.tokens_per_s": 1e4,
        "time.mfu_fraction": 0.4, "time.optimizer_s": 0.1, "time.startup_s": 9.0,
    }  # fmt: skip
    for key in found.quantities:  # the very names of the plan
        value: Any = demo
        for step in key.split("."):
            value = getattr(value, step)
    assert [(p.name, p.seconds, p.peak_allocated_bytes) for p in found.phases] == [
        ("forward", 0.2, 9 * GIB), ("backward", 0.3, 10 * GIB), ("optimizer", 0.1, None),
    ]  # fmt: skip
    assert found.timeline is not None
    assert found.timeline.peak == 1
    assert not found.instead
    assert "another process took 2.00 GiB" in found.notes[0]


@pytest.mark.parametrize(("scale", "said"), [(1.0, False), (1.25, False), (1.9, True), (0.6, True)])
def test_a_host_that_is_another_than_planned_is_said(demo: Plan, scale: float, said: bool) -> None:
    found = measurement_of(demo, FOUND | {"host_scale": scale})

    assert [f"took {scale:.2f} times" in note for note in found.notes] == [True] * said


def test_where_building_needs_most_the_steps_are_judged_by_what_they_need() -> None:
    plan = sftplan.api.plan(
        model="gpt2-xl", seq_len=128, hardware="h200-sxm", command=["x"], zero=2, offload="optimizer",
        micro_batch=1, accumulation=1,
    )  # fmt: skip
    gpu = plan.memory.gpu
    found = measurement_of(plan, FOUND)

    assert gpu.peak_at == BUILDING
    beyond = gpu.peak_allocated_bytes - found.instead["memory.gpu.peak_allocated_bytes"]
    assert 0 < beyond < gpu.peak_allocated_bytes
    used, reserved = (found.instead[f"memory.gpu.{n}_bytes"] for n in ("used", "peak_reserved"))
    assert used - reserved == gpu.used_bytes - gpu.peak_reserved_bytes
    assert "while the model is built" in found.notes[-1]
    rows = {row.quantity: row.predicted for row in judge(plan, found).rows}
    assert rows["memory.gpu.used_bytes"] == used


def test_a_rehearsal_is_read_with_the_small_cards_context_and_no_times(demo: Plan) -> None:
    found = measurement_of(demo, FOUND, rehearse="t4")
    gpu = demo.memory.gpu

    assert not any(key.startswith("time.") for key in found.quantities)
    assert (
        found.quantities["memory.gpu.used_bytes"]
        == 11 * GIB + gpu.used_bytes - gpu.peak_reserved_bytes
    )
    assert "memory.gpu.context_bytes" not in found.quantities
    assert found.rehearsal
    assert "time is this GPU's" in found.notes[0]


def test_running_out_of_memory_is_told_with_its_numbers(demo: Plan) -> None:
    numbers = {
        "phase": "backward", "step": 1, "allocated_bytes": 7, "reserved_bytes": 8, "free_bytes": 1,
        "total_bytes": 9, "taken_before_bytes": 0, "message": "CUDA out of memory",
    }  # fmt: skip
    found = measurement_of(demo, {"out_of_memory": numbers})

    assert found.quantities == {}
    assert found.out_of_memory is not None
    assert (found.out_of_memory.phase, found.out_of_memory.reserved_bytes) == ("backward", 8)


def test_a_calibration_that_cannot_be_kept_loses_no_measurement(
    demo: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        message = "cannot make /x"
        raise UsageError(message)

    monkeypatch.setattr(profile, "measure_here", lambda *_, **__: dict(FOUND))
    monkeypatch.setattr(profile, "learn", refuse)
    found = profile.measure(demo)

    assert found.quantities["time.step_s"] == 0.5
    assert found.notes == ("no calibration was kept: cannot make /x",)
