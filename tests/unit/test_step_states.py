"""What a step holds beside weights and activations: masters, positions, what only the first one takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftplan.cost.device import device_of
from sftplan.cost.kernels import GRAPH_GAP_S, GRAPH_RESET_S, kernel_s
from sftplan.cost.memory import Peaks, exact_peaks
from sftplan.facts.catalogue import builtin
from sftplan.facts.params import num_parameters, parameters
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Attention, Loss, Optimizer, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.chip import HOPPER, Chip
from sftplan.step.repeat import Events
from sftplan.step.simulate import simulate
from sftplan.step.tensor import DType
from sftplan.step.work import Work
from sftplan.units import MIB

if TYPE_CHECKING:
    from sftplan.step.tape import Tape

PACKED = Strategy(
    precision=Precision.BF16_MASTER, attention=Attention.VARLEN, packing=True, compile=True,
    loss=Loss.CHUNKED, micro_batch=4,
)  # fmt: skip
SMALL = ("gpt2", "opt-125m", "smollm2-135m", "pythia-160m")


def tape_of(name: str, strategy: Strategy, chip: Chip = HOPPER) -> Tape:
    """Two steps of full rows, each a document."""
    documents = (256,) * strategy.micro_batch if strategy.packing else ()
    batch = Batch(rows=strategy.micro_batch, length=256, num_targets=512, documents=documents)
    return simulate(builtin(name), strategy, batch, chip=chip)


def peaks_of(tape: Tape) -> Peaks:
    """Through the allocator, passes captured."""
    events = Events(tape.events, tape.sizes, tape.kinds, tape.marks)
    return exact_peaks(events, expandable=True, captured=True)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("optimizer", "each_bytes"), [(Optimizer.ADAMW, 2 + 4 + 4), (Optimizer.ADAMW_8BIT, 4 + 1 + 1)]
)
def test_masters_are_the_weights_and_16_bits_more_but_for_8_bit_states(
    name: str, optimizer: Optimizer, each_bytes: int
) -> None:
    tape = tape_of(name, replace(PACKED, optimizer=optimizer))
    kinds = zip(tape.sizes, tape.kinds, strict=True)
    held = sum(size for size, kind in kinds if kind == "optimizer")

    count, tensors = num_parameters(builtin(name)), len(parameters(builtin(name)))
    scales = 2 * 4 * count / 256 + 6 * 4096 * tensors if optimizer is Optimizer.ADAMW_8BIT else 0
    assert 0 <= held - each_bytes * count <= 4 * tensors + scales


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(SMALL), st.sampled_from([0, 60 * MIB, 200 * MIB]), st.booleans())
def test_what_inductor_tries_kernels_with_is_reserved_once_and_in_no_peak(
    name: str, l2_bytes: int, compiled: bool
) -> None:
    strategy = replace(PACKED, compile=compiled)
    without, with_it = (
        tape_of(name, strategy, replace(HOPPER, l2_bytes=size)) for size in (0, l2_bytes)
    )
    assert with_it.kinds.count("tuning") == compiled
    before, after = peaks_of(without), peaks_of(with_it)
    assert after.allocated_bytes == before.allocated_bytes
    assert before.reserved_bytes <= after.reserved_bytes <= before.reserved_bytes + l2_bytes


@pytest.mark.parametrize("name", [name for name in SMALL if name != "opt-125m"])
def test_packed_tokens_have_positions_of_their_own(name: str) -> None:
    """What GPT-2 looks up, and the tables of those that rotate, are as many rows as the batch has; OPT's always."""
    model = builtin(name)
    packed = replace(PACKED, compile=False, attention=Attention.SDPA)
    apart, alike = (tape_of(name, replace(packed, packing=told)) for told in (True, False))
    rotary = int(model.head_dim * model.rotary_fraction)
    size = 2 * (model.hidden_size if name == "gpt2" else rotary)

    def births(tape: Tape, rows: int) -> int:
        start = next(at for at, label in tape.marks if label == "forward")
        stop = next(at for at, label in tape.marks if label == "forward 0")
        born = [tape.sizes[event] for event in tape.events[start:stop] if event >= 0]
        return born.count(rows * 256 * size)

    rows = packed.micro_batch
    assert births(apart, rows) > births(alike, rows)
    assert births(alike, 1) > births(apart, 1)


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_only_large_products_in_graphs_wait_for_a_counter(rows: int, columns: int) -> None:
    device = device_of(load_hardware("h200-sxm"))
    work = Work("linear", DType.BF16, 2 * rows * columns * 512, 0, (rows, columns, 512))
    apart, in_graph = (kernel_s(work, device, captured=captured) for captured in (False, True))
    waits = GRAPH_RESET_S if rows * columns >= 10e6 else 0.0
    assert in_graph - apart == pytest.approx(GRAPH_GAP_S - 1e-6 + waits, abs=1e-12)
