"""The clock that a power limit allows: the law it comes from, and what it does to a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.cost.evaluate import Evaluator
from sftplan.cost.power import clock_fraction
from sftplan.facts.catalogue import builtin
from sftplan.facts.params import num_parameters
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Attention, Loss, Precision, Strategy
from sftplan.facts.workload import Workload

LIMIT = 335e12
H200 = load_hardware("h200-sxm")
CAPTURED = Strategy(
    micro_batch=1, accumulation=1, precision=Precision.BF16_MASTER, attention=Attention.SDPA,
    loss=Loss.RESPONSE, compile=True,
)  # fmt: skip


@given(
    rate=st.floats(1e12, 1e15), step_s=st.floats(1e-3, 10.0), share=st.floats(0.01, 1.0)
)  # fmt: skip
def test_the_limit_is_drawn_or_not_reached(rate: float, step_s: float, share: float) -> None:
    flops, compute_s = rate * step_s, share * step_s
    clock = clock_fraction(flops, compute_s, step_s, LIMIT)
    drawn = flops / (step_s - compute_s + compute_s / clock) * clock**2
    if rate <= LIMIT:
        assert clock == 1.0
    else:
        assert 0 < clock < 1
        assert drawn == pytest.approx(LIMIT, rel=1e-6)


def test_a_limit_that_nobody_knows_binds_nothing() -> None:
    assert clock_fraction(1e18, 1.0, 1.0, None) == 1.0


def seconds(strategy: Strategy, power_flops_per_s: float) -> float:
    rows = strategy.micro_batch * strategy.accumulation
    workload = Workload(seq_len=1024, global_batch=rows, global_batch_pinned=True)
    gpu = replace(H200.gpu, power_flops_per_s=power_flops_per_s)
    evaluator = Evaluator(builtin("gpt2-large"), workload, num_gpus=1, gpus_per_node=1)
    return evaluator.step_seconds(strategy, replace(H200, gpu=gpu))


def test_many_rows_meet_the_limit_and_one_does_not() -> None:
    many = replace(CAPTURED, micro_batch=32)
    assert seconds(many, LIMIT) > 1.05 * seconds(many, 2 * LIMIT)
    assert seconds(CAPTURED, LIMIT) == seconds(CAPTURED, 2 * LIMIT)


def test_the_first_of_several_passes_adds_to_no_gradients() -> None:
    one, two, three = (
        seconds(replace(CAPTURED, micro_batch=2, accumulation=count), 10 * LIMIT)
        for count in (1, 2, 3)
    )
    first_and_update, second, third = one, two - one, three - two
    assert second == pytest.approx(third)
    num = num_parameters(builtin("gpt2-large"))
    added_s = 6 * num / 4.4e12  # two are read and one is written, in bf16
    update_s = 26 * num / (4.4e12 * 0.70)  # of master_adamw
    assert second - (first_and_update - update_s) == pytest.approx(added_s, rel=0.3)
