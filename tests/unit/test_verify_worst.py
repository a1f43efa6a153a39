"""The batches of a dry run: as full as the data makes them, the worst at the shape of all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.facts.workload import LengthStatistics
from sftplan.train.demo import DEMO_SEQ_LEN
from sftplan.train.inputs import to_device
from sftplan.verify import run
from sftplan.verify.request import Request
from sftplan.verify.worst import drawn_lengths, made_up_batches, worst_micro_batch

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


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
