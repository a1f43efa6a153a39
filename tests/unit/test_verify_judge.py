"""The judge: what is within the tolerance, what is off, and what is safe then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import sftplan
from sftplan.plan.file import document
from sftplan.report.verification import verification_text
from sftplan.verify import measurement as keys
from sftplan.verify.judge import judge, predicted_of
from sftplan.verify.measurement import Measurement, OutOfMemory
from sftplan.verify.next_plan import KNOBS

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sftplan.plan(model="gpt2-large", seq_len=1024, hardware="rtx-4090", global_batch=8)


def measured(plan: Plan, **factors: float) -> Measurement:
    names = {
        "allocated": keys.ALLOCATED,
        "reserved": keys.RESERVED,
        "used": keys.USED,
        "step": keys.STEP,
    }
    found = {}
    for name, key in names.items():
        value = predicted_of(plan, key)
        assert value is not None
        found[key] = value * factors.get(name, 1.0)
    return Measurement(mode="gpu", quantities=found)


def test_a_prediction_that_holds(plan: Plan) -> None:
    judged = judge(plan, measured(plan, allocated=1.019, step=0.92))
    assert judged.ok
    assert judged.judgement == "the prediction holds"
    assert [row.within for row in judged.rows] == [True, True, True, True]
    assert judged.rows[0].error_fraction == pytest.approx(1 / 1.019 - 1)


@pytest.mark.parametrize(
    ("name", "factor", "said"),
    [
        ("reserved", 1.05, "memory.gpu.peak_reserved_bytes was predicted 4.8% below"),
        ("used", 0.9, "memory.gpu.used_bytes was predicted 11.1% above"),
        ("step", 1.25, "time.step_s was predicted 20.0% below"),
    ],
)
def test_the_term_that_is_off_is_named(plan: Plan, name: str, factor: float, said: str) -> None:
    judged = judge(plan, measured(plan, **{name: factor}))
    assert not judged.ok
    assert judged.judgement.startswith(said)
    assert judged.next_plan is None  # it ran: another plan is not needed


def test_out_of_memory_names_a_plan_that_needs_less_and_keeps_the_batch(plan: Plan) -> None:
    gpu = plan.memory.gpu
    out = OutOfMemory(
        phase="backward", step=2, allocated_bytes=gpu.capacity_bytes, message="no room",
        reserved_bytes=gpu.peak_reserved_bytes + 2**30, free_bytes=0, total_bytes=gpu.capacity_bytes,
        others_bytes=None,
    )  # fmt: skip
    judged = judge(plan, Measurement(mode="gpu", quantities={}, out_of_memory=out))
    assert not judged.ok
    assert "out of GPU memory in backward of step 2" in judged.judgement
    assert judged.next_plan
    knobs: dict[str, Any] = {name: getattr(plan.strategy, name) for name in KNOBS}
    knobs |= judged.next_plan
    less = sftplan.plan(
        model="gpt2-large", seq_len=1024, hardware="rtx-4090", global_batch=8, **knobs
    )
    assert less.fits
    assert less.memory.gpu.used_bytes < gpu.used_bytes - 2**30


def test_a_rehearsal_judges_no_time(plan: Plan) -> None:
    found = measured(plan, step=3.0)
    rehearsal = Measurement(mode="gpu", quantities=found.quantities, rehearsal=True)
    assert judge(plan, rehearsal).ok


def test_the_screen_has_a_line_per_quantity(plan: Plan) -> None:
    found = document(judge(plan, measured(plan, step=1.25)))
    assert isinstance(found, dict)
    text = verification_text(found)
    assert text.startswith("Not as predicted: time.step_s")
    assert sum(line.startswith("memory.gpu.") for line in text.splitlines()) == 3
