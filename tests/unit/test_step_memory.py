"""Laws of the tape: what must hold for any model, strategy and batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftplan.cost.allocator import replay
from sftplan.cost.memory import allocated_bound_bytes, exact_peaks
from sftplan.facts.catalogue import builtin
from sftplan.facts.params import num_parameters
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
from sftplan.step.batch import Batch
from sftplan.step.few import few_layers
from sftplan.step.repeat import FEW_LAYERS, Events, expand
from sftplan.step.shard import REDUCING
from sftplan.step.simulate import simulate, steady
from sftplan.step.tape import ASIDE
from sftplan.units import MIB

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.step.tape import Tape

FAMILIES = (
    "gpt2", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2b", "gemma-3-1b", "phi-2",
    "phi-3-mini", "pythia-410m", "opt-125m", "opt-350m", "mixtral-8x7b", "qwen1.5-moe-a2.7b",
)  # fmt: skip

any_strategy = st.builds(
    Strategy,
    precision=st.sampled_from(Precision),
    checkpointing=st.sampled_from(Checkpointing),
    checkpointed_layers=st.none() | st.integers(1, 6),
    attention=st.sampled_from([Attention.SDPA, Attention.EAGER]),
    loss=st.sampled_from(Loss),
    micro_batch=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    optimizer=st.sampled_from(Optimizer),
    max_grad_norm=st.sampled_from([0.0, 1.0]),
)
any_family = st.sampled_from(FAMILIES)


def small(name: str, num_layers: int = 7) -> ModelShape:
    """A named shape with few layers, all of one kind."""
    shape = builtin(name)
    return replace(shape, num_layers=num_layers, layer_kinds=(), dense_layers=())


def batch_of(strategy: Strategy, length: int = 64) -> Batch:
    rows = strategy.micro_batch
    return Batch(rows=rows, length=length, num_targets=rows * length)


def until_end(tape: Tape | Events) -> list[int]:
    """Events up to the end of the last step: how a program takes itself down is not planned."""
    return tape.events[: tape.marks[-1][0]]


def allocated(model: ModelShape, strategy: Strategy, length: int = 64, num_gpus: int = 1) -> int:
    tape = simulate(model, strategy, batch_of(strategy, length), num_gpus=num_gpus)
    return replay(tape.events, tape.sizes, expandable=True).peak_allocated_bytes


@settings(deadline=None, max_examples=30)
@given(any_family, any_strategy, st.integers(FEW_LAYERS + 2, 14))
def test_few_layers_stand_for_any_number(name: str, strategy: Strategy, num_layers: int) -> None:
    model = small(name, num_layers)
    few = few_layers(model, strategy, 64)
    batch = batch_of(strategy)

    written = expand(simulate(few.model, few.strategy, batch, times=few.times), few.times)
    direct = simulate(model, strategy, batch)

    if strategy.precision is Precision.BF16_MASTER:
        # Its buckets end inside of the repeated layers: states of the first step come in another order.
        peaks = [replay(tape.events, tape.sizes, expandable=True) for tape in (written, direct)]
        assert peaks[0].peak_allocated_bytes == peaks[1].peak_allocated_bytes
        return
    assert until_end(written) == until_end(direct)
    assert written.sizes[: len(direct.sizes)] == direct.sizes
    assert written.kinds[: len(direct.kinds)] == direct.kinds


SHARDED = [
    (1, Offload.NONE), (2, Offload.NONE), (3, Offload.NONE), (1, Offload.OPTIMIZER),
    (2, Offload.OPTIMIZER), (3, Offload.OPTIMIZER), (3, Offload.ALL),
]  # fmt: skip


@pytest.mark.parametrize(("zero", "offload"), SHARDED)
@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b"])
def test_few_layers_stand_for_any_number_of_shards(name: str, zero: int, offload: Offload) -> None:
    model = small(name, 9)
    strategy = Strategy(precision=Precision.BF16_MASTER, zero=zero, offload=offload, accumulation=2)
    few = few_layers(model, strategy, 64)
    assert few.model.num_layers == FEW_LAYERS
    whole = simulate(model, strategy, batch_of(strategy), num_gpus=4)
    tape = simulate(few.model, few.strategy, batch_of(strategy), num_gpus=4, times=few.times)
    written = expand(tape, few.times)
    peaks = [replay(events.events, events.sizes, expandable=True) for events in (written, whole)]

    assert peaks[0].peak_allocated_bytes == peaks[1].peak_allocated_bytes
    assert peaks[0].peak_reserved_bytes == peaks[1].peak_reserved_bytes


@settings(deadline=None, max_examples=20)
@given(any_family, any_strategy)
def test_every_storage_dies_once_and_the_categories_add_up(name: str, strategy: Strategy) -> None:
    tape = simulate(small(name), strategy, batch_of(strategy))
    events = Events(tape.events, tape.sizes, tape.kinds, tape.marks)

    live: set[int] = set()
    for event in tape.events:
        if event >= 0:
            assert event not in live
            live.add(event)
        else:
            live.remove(~event)
    for expandable in (False, True):
        peaks = exact_peaks(events, expandable=expandable)
        assert sum(peaks.by_category.values()) == peaks.allocated_bytes <= peaks.reserved_bytes
        assert all(size >= 0 for size in peaks.by_category.values())


@settings(deadline=None, max_examples=20)
@given(any_family, any_strategy)
def test_memory_grows_with_batch_length_and_layers(name: str, strategy: Strategy) -> None:
    model = small(name)
    base = allocated(model, strategy)

    assert allocated(model, replace(strategy, micro_batch=strategy.micro_batch + 1)) >= base
    assert allocated(model, strategy, length=128) >= base
    assert allocated(small(name, 8), strategy) > base


@settings(deadline=None, max_examples=20)
@given(any_family, any_strategy)
def test_memory_is_convex_in_the_layers_that_are_checkpointed(
    name: str, strategy: Strategy
) -> None:
    """Which the search relies on; a thousandth is what the seam between the two stretches may be off."""
    kind = (
        Checkpointing.FULL
        if strategy.checkpointing is Checkpointing.NONE
        else strategy.checkpointing
    )
    batch, model = batch_of(strategy, 512), small(name, 16)
    found = []
    for layers in (1, 4, 8, 12, 15):
        some = replace(strategy, checkpointing=kind, checkpointed_layers=layers)
        few = few_layers(model, some, 512)
        tape = steady(few.model, few.strategy, batch, times=few.times)
        found.append(allocated_bound_bytes(tape, few.times))

    assert found[2] <= (found[1] + found[3]) / 2 * 1.001
    assert all(after <= before * 1.001 for before, after in pairwise(found))


@settings(deadline=None, max_examples=20)
@given(any_family, any_strategy)
def test_the_bound_is_near_the_steady_peak_and_not_above(name: str, strategy: Strategy) -> None:
    model = small(name, 9)
    few = few_layers(model, strategy, 64)
    batch = batch_of(strategy)

    bound = allocated_bound_bytes(
        steady(few.model, few.strategy, batch, times=few.times), few.times
    )
    tape = simulate(model, strategy, batch, num_steps=3)
    exact = replay(tape.events, tape.sizes, expandable=True).peak_allocated_bytes

    assert 0.995 * exact <= bound <= 1.005 * exact


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER])
def test_a_higher_zero_stage_never_needs_more_for_model_states(
    num_gpus: int, offload: Offload
) -> None:
    model = builtin("gpt2-medium")
    stages = []
    for stage in (1, 2, 3):
        strategy = Strategy(
            precision=Precision.BF16_MASTER, zero=stage, offload=offload, micro_batch=1
        )
        tape = simulate(model, strategy, batch_of(strategy), num_gpus=num_gpus)
        stages.append(_states_bytes(tape))

    assert stages == sorted(stages, reverse=True)


def _states_bytes(tape: Tape) -> int:
    """Weights, gradients and optimizer states when a steady step's backward pass is done: all are there."""
    start = [position for position, label in tape.marks if label == "clip"][-1]
    live = 0
    for event in tape.events[:start]:
        index = event if event >= 0 else ~event
        if tape.kinds[index].partition(ASIDE)[0] in ("weights", "gradients", "optimizer"):
            live += tape.sizes[index] if event >= 0 else -tape.sizes[index]
    return live


def test_streams_do_not_lend_each_other_what_they_have_freed() -> None:
    """Two blocks, one after the other: one segment on one stream, one each on two; allocated the same."""
    events, sizes = [0, ~0, 1, ~1], [40 * MIB, 40 * MIB]
    one = replay(events, sizes, expandable=True, streams=["", ""])
    two = replay(events, sizes, expandable=True, streams=["", "reduce"])

    assert one == replay(events, sizes, expandable=True)
    assert two.peak_allocated_bytes == one.peak_allocated_bytes == 40 * MIB
    assert (one.peak_reserved_bytes, two.peak_reserved_bytes) == (40 * MIB, 80 * MIB)


@pytest.mark.parametrize("zero", [1, 2])
def test_ranks_take_their_share_of_the_gradients_on_the_stream_that_reduces(zero: int) -> None:
    """Alone there is nobody to reduce with; among four, whole gradients go as soon as they have come."""
    model = builtin("gpt2")
    strategy = Strategy(precision=Precision.BF16_MASTER, zero=zero, micro_batch=1)
    peaks = {}
    for ranks in (1, 4):
        tape = simulate(model, strategy, batch_of(strategy), num_gpus=ranks)
        kinds = dict.fromkeys(tape.kinds)
        peaks[ranks] = exact_peaks(
            Events(tape.events, tape.sizes, tape.kinds, tape.marks), expandable=True
        )
        assert (f"gradients{REDUCING}" in kinds) is (ranks > 1)
    count = num_parameters(model)
    states = {ranks: count * (2 + 12 / ranks) for ranks in (1, 4)}

    assert peaks[4].allocated_bytes - states[4] < peaks[1].allocated_bytes - states[1]
    assert "@" not in "".join(peaks[4].by_category)


def test_what_is_built_has_to_fit_as_well() -> None:
    """Alone, all weights flat and a copy; among eight, a copy of an eighth. Old weights may wait on the host."""
    model = builtin("gpt2-large")
    strategy = Strategy(
        precision=Precision.BF16_MASTER, zero=2, offload=Offload.OPTIMIZER, micro_batch=1,
        checkpointing=Checkpointing.FULL,
    )  # fmt: skip
    weights_bytes = 2 * num_parameters(model)
    peaks = {}
    for ranks in (1, 8):
        tape = simulate(model, strategy, batch_of(strategy), num_gpus=ranks)
        events = Events(tape.events, tape.sizes, tape.kinds, tape.marks)
        peaks[ranks] = exact_peaks(events, expandable=True)

    assert peaks[1].allocated_bytes == pytest.approx(2 * weights_bytes, rel=0.01)
    assert peaks[1].at == "building of the model"
    assert peaks[1].reserved_bytes >= peaks[1].allocated_bytes
    assert peaks[8].at.startswith("backward")


def test_checkpointing_and_chunks_save_what_they_promise() -> None:
    model = builtin("gpt2")
    peaks = [
        allocated(model, Strategy(micro_batch=8, checkpointing=c, loss=loss), length=1024)
        for c, loss in (
            (Checkpointing.NONE, Loss.RESPONSE),
            (Checkpointing.SELECTIVE, Loss.RESPONSE),
            (Checkpointing.FULL, Loss.RESPONSE),
            (Checkpointing.FULL, Loss.CHUNKED),
        )
    ]

    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 1.5 * peaks[2] > 2 * peaks[3]


def test_allocators_agree_on_what_is_live() -> None:
    strategy = Strategy(micro_batch=2, allocator=Allocator.DEFAULT)
    tape = simulate(builtin("gpt2"), strategy, batch_of(strategy, 1024))

    default = replay(tape.events, tape.sizes, expandable=False)
    expandable = replay(tape.events, tape.sizes, expandable=True)

    assert expandable.peak_allocated_bytes <= default.peak_allocated_bytes
    assert default.peak_allocated_bytes <= default.peak_reserved_bytes
    assert expandable.peak_reserved_bytes < 1.1 * expandable.peak_allocated_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b"])
def test_stage_3_has_of_the_weights_no_more_than_shares_and_the_one_that_is_cut(name: str) -> None:
    """They are built on the host and cut up one by one."""
    model, ranks = small(name, 3), 8
    strategy = Strategy(precision=Precision.BF16_MASTER, zero=3, offload=Offload.OPTIMIZER)
    tape = simulate(model, strategy, batch_of(strategy), num_gpus=ranks)
    built = next(position for position, label in tape.marks if label == "forward")
    live = most = 0
    for event in tape.events[:built]:
        kind = tape.kinds[max(event, ~event)].partition(ASIDE)[0]
        if kind in ("weights", "temporary"):
            live += tape.sizes[event] if event >= 0 else -tape.sizes[~event]
            most = max(most, live)

    table = 2 * model.vocab_size * model.hidden_size
    shares = 2 * num_parameters(model) / ranks
    assert most == pytest.approx(max(table * (1 + 1 / ranks), shares), rel=1e-3)


def test_70b_fits_eight_cards_of_80_gb_because_no_card_ever_has_all_of_it() -> None:
    """140 GB of weights, of which each holds an eighth, and a checkpoint per layer."""
    strategy = Strategy(
        precision=Precision.BF16_MASTER, zero=3, offload=Offload.OPTIMIZER, micro_batch=1,
        checkpointing=Checkpointing.FULL,
    )  # fmt: skip
    few = few_layers(builtin("llama-3-70b"), strategy, 2048)
    batch = batch_of(strategy, 2048)
    tape = simulate(few.model, few.strategy, batch, num_gpus=8, times=few.times)
    peaks = exact_peaks(expand(tape, few.times), expandable=True)

    assert peaks.at != "building of the model"
    gathered = peaks.by_category["weights"] - 2 * num_parameters(builtin("llama-3-70b")) / 8
    assert 0 < gathered < 8e9  # a layer or two and the head
    assert peaks.reserved_bytes < 40e9
