"""The search against brute force, with an analytic coster that obeys the laws of the real one."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_jobs import jobs
from toy_search import Job, ToyCoster, hardware, job, workload

from sftplan.errors import UsageError
from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
    Strategy,
)
from sftplan.search.coster import capacity_bytes, judge
from sftplan.search.explore import TIE_FRACTION
from sftplan.units import GIB

if TYPE_CHECKING:
    from sftplan.cost.estimate import Estimate
    from sftplan.facts.hardware import Hardware


def per_example(estimate: Estimate) -> float:
    assert estimate.time.step_s is not None
    return estimate.time.step_s / estimate.examples_per_step


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_the_fastest_that_fits_is_chosen(job: Job) -> None:
    job = replace(job, pins=job.pins | {"compile": job.pins.get("compile", True)})
    choice, feasible = job.choose(), job.brute_force()
    assert (choice.verdict != "does_not_fit") == bool(feasible)
    if feasible:
        fastest = min(per_example(estimate) for _, estimate in feasible)
        assert per_example(choice.estimate) <= fastest * (1 + TIE_FRACTION) * (1 + 1e-9)
        assert choice.verdict == judge(feasible[0][1], job.machine, job.margin)


@settings(max_examples=60, deadline=None)
@given(jobs(), st.lists(st.floats(1, 1.1), min_size=2, max_size=4))
def test_an_uneven_allocator_is_never_trusted(job: Job, excess: list[float]) -> None:
    job = replace(job, toy=replace(job.toy, excess=tuple(excess)))
    choice, feasible = job.choose(), job.brute_force()
    assert choice.verdict == judge(choice.estimate, job.machine, job.margin)
    limit = capacity_bytes(job.machine) * (1 - job.margin) / max(excess)
    surely = [e for _, e in feasible if e.memory.peak_allocated_bytes * 1.1 < limit]
    if surely:
        assert choice.verdict != "does_not_fit"


@settings(max_examples=40, deadline=None)
@given(jobs())
def test_pins_and_the_global_batch_are_kept(job: Job) -> None:
    choice = job.choose()
    strategy = choice.strategy
    assert {knob: getattr(strategy, knob) for knob in job.pins} == job.pins
    rows = strategy.micro_batch * strategy.accumulation * job.toy.num_gpus
    if not strategy.packing:
        assert rows == job.toy.workload.global_batch
    assert choice.neighbours is choice.neighbours
    assert len(job.toy.exact) == len(set(job.toy.exact))
    if choice.verdict != "does_not_fit":
        assert len(set(job.toy.exact)) <= 6


COUPLED = (
    {"micro_batch", "accumulation"},
    {"offload", "zero", "compile"},
    {"zero", "compile"},
    {"checkpointing", "checkpointed_layers"},
    {"packing", "attention", "micro_batch", "accumulation"},
)


class UnevenCoster(ToyCoster):
    """The loss on all response positions at once leaves the allocator holes, that in chunks none."""

    def estimate(self, strategy: Strategy, hardware: Hardware) -> Estimate:
        estimate = super().estimate(strategy, hardware)
        if strategy.loss is not Loss.CHUNKED:
            return estimate
        memory = estimate.memory
        return replace(estimate, memory=replace(memory, used_bytes=memory.peak_allocated_bytes))


@settings(max_examples=40, deadline=None)
@given(st.floats(7.5, 18), st.floats(1.02, 1.2))
def test_what_one_branch_shows_rules_out_no_other(gib: float, excess: float) -> None:
    pins: dict[str, Any] = {"checkpointing": Checkpointing.FULL, "precision": Precision.BF16_MASTER}
    toy = UnevenCoster(
        workload=workload(), excess=(excess,), weights_gib=0.4, logits_gib=0.02, chunk=0.03, dispatch_s=1.0
    )  # fmt: skip
    pins |= {"compile": True, "offload": Offload.NONE}
    uneven = Job(machine=hardware(gib), toy=toy, pins=pins)
    choice, feasible = uneven.choose(), uneven.brute_force()
    fastest = min(per_example(estimate) for _, estimate in feasible)
    assert per_example(choice.estimate) <= fastest * (1 + TIE_FRACTION) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_a_neighbour_differs_in_one_decision(job: Job) -> None:
    choice = job.choose()
    for other in choice.neighbours:
        old, new = asdict(choice.strategy), asdict(other.strategy)
        differs = {knob for knob in old if old[knob] != new[knob]}
        assert differs == set(other.change)
        assert len(differs) == 1 or any(differs <= together for together in COUPLED)
        assert not differs & set(job.pins)
        assert other.verdict == judge(other.estimate, job.machine, job.margin)
    fits = [other.verdict != "does_not_fit" for other in choice.neighbours]
    assert fits == sorted(fits, reverse=True)
    times = [
        o.estimate.time.step_s or 0.0 for o in choice.neighbours if o.verdict != "does_not_fit"
    ]
    assert times == sorted(times)
    for what, why in choice.reasons:
        assert what.split()[0].replace("-", "_") not in job.pins
        assert why


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_a_remedy_fits_when_it_is_followed(job: Job) -> None:
    small = replace(job, machine=hardware(3.0, gpus=job.toy.num_gpus))
    remedies = small.choose().remedies
    assert len(remedies) <= 3
    for remedy in remedies:
        change: dict[str, Any] = dict(remedy.change)
        gpus = change.pop("gpus", small.toy.num_gpus)
        work = small.toy.workload
        work = replace(work, seq_len=change.pop("seq_len", work.seq_len))
        if {"micro_batch", "accumulation"} <= change.keys():
            rows = change["micro_batch"] * change["accumulation"] * gpus
            work = replace(work, global_batch=rows, global_batch_pinned=True)
        types = {knob: type(getattr(remedy.strategy, knob)) for knob in change}
        followed = Job(
            machine=hardware(3.0, gpus=gpus),
            toy=replace(small.toy, workload=work, num_gpus=gpus, exact=[], cheap=set()),
            pins=small.pins | {knob: types[knob](value) for knob, value in change.items()},
            margin=small.margin,
        )
        assert followed.choose().verdict == "fits"


ONE_POINT: dict[str, Any] = {
    "precision": Precision.BF16_MIXED,
    "checkpointing": Checkpointing.NONE,
    "loss": Loss.RESPONSE,
    "compile": False,
    "micro_batch": 4,
    "offload": Offload.NONE,
}


def test_verdicts_change_at_the_margin_and_at_the_capacity() -> None:
    used = job(100.0, ONE_POINT).choose().estimate.memory.used_bytes
    for capacity, verdict in (
        (-(-used * 20 // 19), "fits"),
        (used * 20 // 19 - 1, "tight"),
        (used, "tight"),
        (used - 1, "does_not_fit"),
    ):
        assert job(capacity / GIB, ONE_POINT).choose().verdict == verdict


@pytest.mark.parametrize(("tokens", "compiled"), [(10**5, False), (10**9, True), (None, True)])
def test_compiling_has_to_pay_for_its_start(tokens: int | None, compiled: bool) -> None:
    choice = job(40.0, workload=workload(tokens=tokens)).choose()
    assert choice.strategy.compile is compiled
    reason = {o.change.get("compile"): o.reason for o in choice.neighbours}.get(True)
    assert compiled or "longer" in str(reason)


def test_offload_only_when_nothing_fits_without() -> None:
    assert job(24.0).choose().strategy.offload is Offload.NONE
    assert job(11.0).choose().strategy.offload is Offload.OPTIMIZER


def test_a_host_too_small_for_offload_does_not_fit() -> None:
    choice = job(11.0, machine=hardware(11.0, host_gib=8)).choose()
    assert choice.verdict == "does_not_fit"
    assert choice.strategy.offload is Offload.NONE


def test_fp16_where_bf16_is_not_native() -> None:
    strategy = job(40.0, machine=hardware(40.0, bf16=False)).choose().strategy
    assert strategy.precision is Precision.FP16_MIXED


def test_data_is_packed_and_keeps_the_mean_number_of_examples() -> None:
    choice = job(40.0, workload=workload(data=True)).choose()
    assert choice.strategy.packing
    assert choice.strategy.attention is Attention.VARLEN
    assert choice.estimate.examples_per_step == pytest.approx(64, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_no_more_layers_are_checkpointed_than_it_takes(job: Job) -> None:
    exact = {
        "allocator": Allocator.EXPANDABLE
    }  # the other one reserves more than is known beforehand
    job = replace(job, toy=replace(job.toy, excess=(1.0,)), pins=job.pins | exact)
    choice = job.choose()
    strategy, layers = choice.strategy, choice.strategy.checkpointed_layers
    if layers is None or "checkpointed_layers" in job.pins:
        return
    fewer = replace(strategy, checkpointed_layers=layers - 1)
    limit = capacity_bytes(job.machine) * (1.0 if choice.verdict == "tight" else 1 - job.margin)
    assert job.toy.bound_bytes(strategy, job.machine) <= limit
    assert job.toy.bound_bytes(fewer, job.machine) > limit


def test_all_layers_is_what_checkpointing_alone_means() -> None:
    pins = {"checkpointing": Checkpointing.FULL}
    assert job(12.0, pins).choose().strategy.checkpointed_layers is None
    pinned = job(12.0, pins | {"checkpointed_layers": 4}).choose().strategy
    assert pinned.checkpointed_layers == 4
    every = job(12.0, pins | {"checkpointed_layers": 6}).choose().strategy
    assert every.checkpointed_layers is None


def test_least_memory_is_what_was_asked_for() -> None:
    wanted = replace(job(40.0), minimize="memory")
    choice, feasible = wanted.choose(), wanted.brute_force()
    least = min(estimate.memory.used_bytes for _, estimate in feasible)
    assert choice.estimate.memory.used_bytes <= least * (1 + TIE_FRACTION)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"offload": Offload.OPTIMIZER, "zero": 0}, "--zero 0"),
        ({"offload": Offload.ALL, "zero": 2}, "--zero 2"),
        ({"offload": Offload.ALL, "optimizer": Optimizer.ADAMW_8BIT}, "adamw-8bit"),
        ({"checkpointed_layers": 2}, "--checkpointed-layers 2 does not say how"),
        ({"checkpointed_layers": 2, "checkpointing": Checkpointing.NONE}, "exclude each other"),
        ({"checkpointed_layers": 7, "checkpointing": Checkpointing.FULL}, "has 6 layers"),
        ({"micro_batch": 7}, "global batch 64 cannot be split over 7"),
        ({"micro_batch": 4, "accumulation": 4}, "global batch 64 is not 16"),
    ],
)
def test_pins_that_exclude_each_other_are_refused(pins: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job(40.0, pins).choose()
