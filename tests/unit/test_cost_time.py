"""Step times: the parts add up, and the knobs move them the right way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sftplan.cost.comm import all_reduce_s, link_bytes_per_s
from sftplan.cost.dispatch import FORWARD_US, MICRO, SELECTIVE_OPERATION_S, VARLEN_NODE_S
from sftplan.cost.evaluate import Evaluator
from sftplan.cost.passes import Passes
from sftplan.cost.time import time_of
from sftplan.facts.captured import waits_for_mask
from sftplan.facts.catalogue import builtin
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Attention, Checkpointing, Loss, Offload, Precision, Strategy
from sftplan.facts.workload import Workload
from sftplan.step.batch import Batch
from sftplan.step.blocks.compiled_work import FORWARD_MOVED
from sftplan.step.few import Few, few_layers
from sftplan.step.simulate import simulate, steady

if TYPE_CHECKING:
    from sftplan.cost.estimate import StepTime
    from sftplan.facts.hardware import Hardware

H200 = load_hardware("h200-sxm")
PLAIN = Strategy(micro_batch=8, attention_dropout="model", max_grad_norm=0.0)


def timed(
    strategy: Strategy,
    model_name: str = "gpt2-large",
    hardware: Hardware = H200,
    *,
    whole: bool = False,
    documents: tuple[int, ...] = (),
    waits_for_mask: bool = False,
) -> StepTime:
    model = builtin(model_name)
    alone = replace(strategy, zero=0, offload=Offload.NONE)
    few = Few(model, alone, {}) if whole else few_layers(model, alone, 1024)
    rows = strategy.micro_batch
    targets = rows * 700 if strategy.loss is not Loss.FULL else 0
    batch = Batch(rows=rows, length=1024, num_targets=targets, documents=documents)
    passes = Passes(steady(few.model, few.strategy, batch), few.times)
    return time_of(passes, strategy, model, hardware, waits_for_mask=waits_for_mask)


def seconds(strategy: Strategy, hardware: Hardware = H200) -> float:
    time = timed(strategy, hardware=hardware)
    assert time.step_s is not None
    return time.step_s


def parts(time: StepTime) -> float:
    return sum(
        part or 0.0
        for part in (
            time.compute_s,
            time.memory_s,
            time.dispatch_s,
            time.communication_s,
            time.offload_s,
            time.optimizer_s,
        )
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_the_parts_add_up(zero: int, micro_batch: int) -> None:
    eight = replace(H200, gpus_per_node=8)
    time = timed(replace(PLAIN, zero=zero, micro_batch=micro_batch), hardware=eight)
    assert time.step_s == pytest.approx(parts(time))


def test_a_large_batch_is_bound_by_the_gpu_and_a_small_one_by_the_host() -> None:
    large, small = timed(PLAIN), timed(replace(PLAIN, micro_batch=1))
    assert (large.dispatch_s or 0) < 0.02 * (large.step_s or 0)
    assert (small.dispatch_s or 0) > 0.3 * (small.step_s or 0)


def test_measured_steps_of_the_h200_that_are_bound_by_the_gpu() -> None:
    """Plain loops on two H200, which are 1 to 3 % apart, torch 2.11, 2026-11. Constants are of single kernels."""
    assert seconds(PLAIN) == pytest.approx((0.217 + 0.215) / 2, rel=0.05)
    true = replace(PLAIN, precision=Precision.BF16_TRUE)
    assert seconds(true) == pytest.approx((0.154 + 0.151) / 2, rel=0.06)
    assert seconds(replace(PLAIN, precision=Precision.FP32)) == pytest.approx(1.010, rel=0.05)
    full = replace(PLAIN, checkpointing=Checkpointing.FULL)
    assert seconds(full) == pytest.approx((0.287 + 0.279) / 2, rel=0.05)


def test_the_host_waits_between_passes_where_transformers_reads_back() -> None:
    """Not where it is asked for no mask: there the host runs ahead into the second one."""

    def beyond(*, waits: bool) -> float:
        one, two = (
            timed(replace(PLAIN, accumulation=count), waits_for_mask=waits) for count in (1, 2)
        )
        return (two.dispatch_s or 0.0) - (one.dispatch_s or 0.0)

    assert beyond(waits=True) > 1e-5
    assert beyond(waits=False) == pytest.approx(0.0, abs=1e-9)


def test_a_mask_is_asked_for_where_causal_is_not_all() -> None:
    gpt2, mistral = builtin("gpt2"), builtin("mistral-7b")
    varlen = replace(PLAIN, attention=Attention.VARLEN, packing=True)

    assert not waits_for_mask(PLAIN, gpt2, 1024)
    assert waits_for_mask(replace(PLAIN, packing=True), gpt2, 1024)
    assert waits_for_mask(replace(PLAIN, attention=Attention.EAGER), gpt2, 1024)
    assert not waits_for_mask(varlen, gpt2, 1024)
    assert waits_for_mask(PLAIN, mistral, 8192)  # its window slides
    assert not waits_for_mask(PLAIN, mistral, 4096)


def test_compiled_blocks() -> None:
    """fast-8 and fast-32 of tests/published/h200_train.csv, one H200."""
    packed = replace(
        PLAIN, precision=Precision.BF16_MASTER, attention=Attention.VARLEN, attention_dropout=0.0,
        loss=Loss.RESPONSE, packing=True, compile=True,
    )  # fmt: skip
    for rows, rate in ((8, 83_523), (32, 93_236)):
        documents = (130, 260, 390, 780) * (rows * 1024 // 1560)
        time = timed(replace(packed, micro_batch=rows), documents=documents)
        assert rows * 1024 / (time.step_s or 1) == pytest.approx(rate, rel=0.12)
        assert time.startup_s == 13.0


def test_norms_behind_the_additions_are_compiled_too() -> None:
    """The tape of OPT-350m's memory is that of the uncompiled block."""
    workload = Workload(seq_len=1024, global_batch=16)
    opt = Evaluator(builtin("opt-350m"), workload, num_gpus=1, gpus_per_node=1)
    like = Strategy(micro_batch=16, precision=Precision.BF16_MASTER, loss=Loss.CHUNKED)
    plain, compiled = (
        opt.estimate(replace(like, compile=compiles), H200).time.memory_s or 0.0
        for compiles in (False, True)
    )

    assert compiled < 0.8 * plain


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("opt-125m", 2 * 768 + 768 + 3072),  # norms, scaled queries, the activation
        ("tinyllama-1.1b", 2 * 2048 + 2048 + 256 + 5632),  # norms, rotated queries and keys
    ],
)
def test_selective_checkpointing_pays_for_what_products_do_not_give(
    name: str, columns: int
) -> None:
    model, batch = builtin(name), Batch(rows=8, length=1024, num_targets=0)

    def fused_bytes(kind: Checkpointing) -> int:
        strategy = replace(PLAIN, compile=True, checkpointing=kind, precision=Precision.BF16_MASTER)
        tape = steady(model, strategy, batch)
        works = [(w, n) for _, each in tape.works for w, n in each.items() if w.kind == "fused"]
        return sum(work.nbytes * times for work, times in works)

    more = fused_bytes(Checkpointing.SELECTIVE) - fused_bytes(Checkpointing.NONE)
    again = model.num_layers * batch.num_tokens * columns * 2 * FORWARD_MOVED[model.norm]
    assert more == pytest.approx(again, rel=0.01)  # statistics of norms beside


@pytest.mark.parametrize(
    ("checkpointing", "layers"),
    [(Checkpointing.NONE, None), (Checkpointing.FULL, None), (Checkpointing.FULL, 6),
     (Checkpointing.SELECTIVE, 10)],
)  # fmt: skip
def test_few_layers_stand_for_all(checkpointing: Checkpointing, layers: int | None) -> None:
    strategy = replace(PLAIN, checkpointing=checkpointing, checkpointed_layers=layers)
    few, whole = timed(strategy, "gpt2"), timed(strategy, "gpt2", whole=True)
    assert few.step_s == pytest.approx(whole.step_s, rel=1e-3)
    assert few.optimizer_s == pytest.approx(whole.optimizer_s, rel=1e-3)


def test_the_second_of_two_simulated_steps_is_the_steady_one() -> None:
    model = builtin("gpt2")
    strategy = replace(PLAIN, micro_batch=2)
    batch = Batch(rows=2, length=1024, num_targets=0)
    two = time_of(Passes(simulate(model, strategy, batch), {}), strategy, model, H200)
    one = time_of(Passes(steady(model, strategy, batch), {}), strategy, model, H200)
    assert two.step_s == pytest.approx(one.step_s)


def test_accumulation_repeats_the_passes_and_not_the_optimizer() -> None:
    once, four = timed(PLAIN), timed(replace(PLAIN, accumulation=4))
    assert 3.8 < (four.compute_s or 0) / (once.compute_s or 1) < 4.01
    assert four.optimizer_s == pytest.approx(once.optimizer_s, rel=0.01)


def test_more_is_slower() -> None:
    assert seconds(PLAIN) < seconds(replace(PLAIN, checkpointing=Checkpointing.FULL))
    assert seconds(PLAIN) < seconds(replace(PLAIN, max_grad_norm=1.0))
    assert seconds(replace(PLAIN, attention_dropout=0.0)) < seconds(PLAIN)
    assert seconds(PLAIN) < seconds(PLAIN, load_hardware("a100-80gb-sxm"))
    offloaded = replace(PLAIN, zero=2, offload=Offload.OPTIMIZER)
    everything = replace(PLAIN, zero=3, offload=Offload.ALL)
    assert seconds(PLAIN) < seconds(offloaded) < seconds(everything)


def test_a_slow_host_slows_small_batches_only() -> None:
    slow = replace(H200, rates=replace(H200.rates, dispatch_scale=1.5))
    small = replace(PLAIN, micro_batch=1)
    assert seconds(small, slow) > 1.2 * seconds(small)
    assert seconds(PLAIN, slow) < 1.02 * seconds(PLAIN)


def test_the_host_pays_for_operators_in_python_and_for_a_selective_policy() -> None:
    """One row of a wide host's share: what runs on the GPU is next to nothing."""
    fast = replace(H200, rates=replace(H200.rates, hbm_fraction=1e3, matmul_fraction=1e3))

    def step_s(checkpointing: Checkpointing, attention: Attention = Attention.SDPA) -> float:
        strategy = Strategy(
            micro_batch=1, precision=Precision.BF16_TRUE, checkpointing=checkpointing, attention=attention
        )  # fmt: skip
        documents = (512, 512) if attention is Attention.VARLEN else ()
        return timed(strategy, hardware=fast, documents=documents).step_s or 0.0

    layers = builtin("gpt2-large").num_layers
    plain, varlen = (
        step_s(Checkpointing.FULL, each) for each in (Attention.SDPA, Attention.VARLEN)
    )
    twice = 2 * (FORWARD_US["varlen"] - FORWARD_US["attention"]) * MICRO  # forward and again
    assert varlen - plain == pytest.approx(layers * (twice + VARLEN_NODE_S), rel=0.1)
    seen = 2 * layers * 20 * SELECTIVE_OPERATION_S  # 20 operations of a block, forward and again
    assert step_s(Checkpointing.SELECTIVE) - plain > seen


def test_every_profile_has_a_time() -> None:
    from sftplan.facts.profiles import profile_names

    for name in profile_names():
        assert seconds(PLAIN, load_hardware(name)) > 0.05


def test_ranks_cost_what_no_pass_hides() -> None:
    """Gradients of 36 layers hide behind the backward pass; the table of tokens comes last, alone."""
    eight = replace(H200, gpus_per_node=8)
    slow = replace(eight, gpu=replace(eight.gpu, nvlink_bytes_per_s=2e9))
    exposed = {zero: timed(replace(PLAIN, zero=zero), hardware=eight) for zero in (0, 1, 2, 3)}
    table = all_reduce_s(50257 * 1280 * 4, 8, link_bytes_per_s(eight))
    everything = all_reduce_s(774_030_080 * 4, 8, link_bytes_per_s(slow))

    assert exposed[0].communication_s == pytest.approx(table, rel=0.2)
    for sharded in (exposed[1], exposed[2]):  # which gather the new weights after the step
        assert (sharded.communication_s or 0) > 3 * (exposed[0].communication_s or 0)
    late = timed(PLAIN, hardware=slow).communication_s or 0
    assert everything - 0.2 < late < everything + 0.02
    four = timed(replace(PLAIN, zero=2, accumulation=4), hardware=slow).communication_s or 0
    once = timed(replace(PLAIN, accumulation=4), hardware=slow).communication_s or 0
    assert four > 3 * once  # stage 2 shares out every pass's gradients


def test_nodes_are_joined_by_as_many_cards_as_gpus() -> None:
    node = replace(H200, gpus_per_node=8, internode_bytes_per_s=12.5e9)
    inside, between = timed(PLAIN, hardware=node), timed(PLAIN, hardware=replace(node, num_nodes=2))
    assert link_bytes_per_s(replace(node, num_nodes=2)) == pytest.approx(
        100e9 * node.rates.allreduce_fraction
    )
    assert (between.communication_s or 0) > 3 * (inside.communication_s or 0)


def test_passes_read_once_serve_every_gpu_as_if_read_for_it() -> None:
    model, batch = builtin("gpt2-large"), Batch(rows=8, length=1024, num_targets=0)
    few = few_layers(model, PLAIN, 1024)
    tape, times = steady(few.model, few.strategy, batch), few.times
    passes = Passes(tape, times)
    for name in ("h200-sxm", "a100-80gb-sxm", "t4", "h200-sxm"):
        for strategy in (PLAIN, replace(PLAIN, accumulation=4, attention_dropout=0.0)):
            hardware = load_hardware(name)
            anew = time_of(Passes(tape, times), strategy, model, hardware)
            assert time_of(passes, strategy, model, hardware) == anew
