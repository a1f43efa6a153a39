"""What a dry run measured, read under the plan's own keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import sftplan.api
from sftplan.cost.memory import BUILDING
from sftplan.errors import UsageError
from sftplan.units import GIB
from sftplan.verify import profile
from sftplan.verify.judge import judge
from sftplan.verify.read import measurement_of

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


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
