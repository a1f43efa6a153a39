"""Passes replayed as CUDA graphs against the same passes issued one by one; on a GPU."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed

from sftplan.data.batches import Sharing, batches
from sftplan.data.conversation import Place
from sftplan.data.mask import Example
from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Attention, Checkpointing, Loss, Optimizer, Precision
from sftplan.train.attention import choose_kernel
from sftplan.train.captured import CapturedPasses
from sftplan.train.compiled import loss_functions, prepare_blocks
from sftplan.train.inputs import Layout, to_device
from sftplan.train.model import build_model, config_of, product_dtype
from sftplan.train.settings import Settings
from sftplan.train.step import LossScale, Stepper, train_step
from sftplan.train.update import Update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the compiler itself warns
]
SEQ_LEN, STEPS = 256, 6
CASES: list[tuple[str, Precision, str, Loss]] = [  # "full/1": of one layer
    ("gpt2", Precision.BF16_MASTER, Checkpointing.NONE, Loss.RESPONSE),
    ("gpt2", Precision.BF16_MIXED, Checkpointing.FULL, Loss.RESPONSE),
    ("gpt2", Precision.BF16_MASTER, Checkpointing.SELECTIVE, Loss.CHUNKED),
    ("qwen3-0.6b", Precision.BF16_MASTER, Checkpointing.NONE, Loss.FULL),
    ("pythia-70m", Precision.BF16_MASTER, Checkpointing.NONE, Loss.RESPONSE),
    ("opt-125m", Precision.FP16_MIXED, Checkpointing.NONE, Loss.CHUNKED),
    ("gpt2", Precision.BF16_MASTER, "full/1", Loss.CHUNKED),
    ("qwen3-0.6b", Precision.BF16_MIXED, "selective/2", Loss.RESPONSE),
]
UNCOMPILED: list[tuple[str, Precision, str, Loss]] = [
    ("gpt2", Precision.BF16_MASTER, Checkpointing.NONE, Loss.RESPONSE),
    ("qwen3-0.6b", Precision.BF16_MIXED, Checkpointing.NONE, Loss.CHUNKED),
    ("qwen3-0.6b", Precision.BF16_MIXED, Checkpointing.FULL, Loss.CHUNKED),
    ("qwen3-0.6b", Precision.BF16_MASTER, Checkpointing.SELECTIVE, Loss.RESPONSE),
    ("gpt2", Precision.BF16_MASTER, Checkpointing.FULL, Loss.CHUNKED),
    ("gpt2", Precision.BF16_MIXED, Checkpointing.SELECTIVE, Loss.RESPONSE),
    ("opt-125m", Precision.FP16_MIXED, Checkpointing.FULL, Loss.RESPONSE),
    ("gpt2", Precision.BF16_MIXED, "full/2", Loss.RESPONSE),
    ("opt-125m", Precision.BF16_MASTER, "selective/1", Loss.CHUNKED),
]


def examples(count: int, vocab: int) -> list[Example]:
    import random
    from array import array

    draw, found = random.Random(3), []
    for number in range(count):
        length = draw.randrange(8, SEQ_LEN)
        ids = array("i", (draw.randrange(vocab) for _ in range(length)))
        trained = bytes(length // 3) + b"\1" * (length - length // 3)
        found.append(Example(input_ids=ids, trained=trained, place=Place(file="made", row=number)))
    return found


@pytest.fixture
def lone_rank() -> Iterator[None]:
    """NCCL with nobody else in it: its collectives are launched all the same."""
    torch.cuda.set_device(0)
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def losses(
    case: tuple[Any, ...], *, captured: bool, release_at: int | None = None, compiled: bool = True,
    world_size: int = 1, spoil: Callable[[Any], None] | None = None, packed: bool = True,
) -> list[list[float]]:  # fmt: skip
    """Loss and norm of each step; a fresh model every time. Rows that are not packed are under SDPA."""
    name, precision, checkpointing, loss = case
    kind, _, layers = checkpointing.partition("/")
    torch._dynamo.reset()
    device = torch.device("cuda")
    config = config_of(builtin(name))
    config.num_hidden_layers = 3
    kernel = choose_kernel(
        Attention.VARLEN if packed else Attention.SDPA, device=device,
        low=product_dtype(precision), config=config, causal=not packed, captured=captured,
    )  # fmt: skip
    model = build_model(config, precision=precision, attention=kernel.name, device=device)
    redraws = prepare_blocks(
        model, checkpointing=Checkpointing(kind), checkpointed_layers=int(layers) if layers else None,
        compiled=compiled, captured=captured,
    )  # fmt: skip
    if spoil is not None:
        spoil(model)
    response, chunk = loss_functions(compiled=compiled)
    update = Update(
        model, precision=precision, kind=Optimizer.ADAMW, settings=Settings(), world_size=world_size
    )
    passes = CapturedPasses(update.parameters, update.summed, redraws) if captured else None
    stepper = Stepper(
        model=model, update=update, precision=precision, loss=loss, max_grad_norm=1.0, device=device,
        response=response, chunk=chunk, captured=passes, world_size=world_size,
        scale=LossScale() if precision is Precision.FP16_MIXED else None,
    )  # fmt: skip
    data = batches(
        examples(400, config.vocab_size), seq_len=SEQ_LEN, sharing=Sharing(micro_batch=2, accumulation=3),
        packing=packed, epochs=1.0, seed=1,
    )  # fmt: skip
    torch.manual_seed(11)
    found = []
    for number in range(STEPS):
        if number == release_at:
            stepper.release()
        step = data.step(0, number)
        layout = Layout(flat=kernel.flat, packed=packed)
        inputs = [to_device(b, layout, device) for b in step.micro_batches]
        seen: list[str] = []
        marked = replace(stepper, mark=seen.append)
        outcome = train_step(marked, inputs, num_targets=step.num_targets, learning_rate=1e-3)
        if spoil is None and world_size == 1:
            assert seen == ["forward", "backward"] * 3 + ["optimizer", "end"]
        found.append([float(outcome.loss), float(outcome.grad_norm)])
    if passes is not None:
        said: list[str] = []
        passes.explain(said.append)
        assert bool(said) == (spoil is not None)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_replayed_steps_are_the_same_steps_to_the_bit(case: Sequence[Any]) -> None:
    assert losses(tuple(case), captured=True) == losses(tuple(case), captured=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_so_are_padded_ones_that_transformers_makes_no_mask_for(case: Sequence[Any]) -> None:
    found = losses(tuple(case), captured=True, packed=False)
    assert found == losses(tuple(case), captured=False, packed=False)


def test_what_was_released_is_captured_again() -> None:
    found = losses(CASES[0], captured=True, release_at=4)
    assert found == losses(CASES[0], captured=False)


@pytest.mark.parametrize("case", UNCOMPILED, ids=lambda case: "-".join(map(str, case)))
def test_so_are_uncompiled_ones(case: Sequence[Any]) -> None:
    found = losses(tuple(case), captured=True, compiled=False)
    assert found == losses(tuple(case), captured=False, compiled=False)


@pytest.mark.parametrize("case", UNCOMPILED, ids=lambda case: "-".join(map(str, case)))
def test_so_are_uncompiled_padded_ones(case: Sequence[Any]) -> None:
    found = losses(tuple(case), captured=True, compiled=False, packed=False)
    assert found == losses(tuple(case), captured=False, compiled=False, packed=False)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: "-".join(map(str, case)))
@pytest.mark.usefixtures("lone_rank")
def test_gradients_are_summed_over_the_ranks_inside_of_the_graph(case: Sequence[Any]) -> None:
    found = losses(tuple(case), captured=True, world_size=2)
    assert found == losses(tuple(case), captured=False)


@pytest.mark.parametrize("number", [0, 1])
def test_what_waits_for_the_gpu_is_issued_as_before(number: int) -> None:
    case = UNCOMPILED[number]
    found = losses(case, captured=True, compiled=False, spoil=_waiting)
    assert found == losses(case, captured=False, compiled=False, spoil=_waiting)


def _waiting(model: Any) -> None:
    """A first layer that reads a number of its input."""

    def read(_: Any, args: Any) -> None:
        float(args[0].sum())

    model.base_model.get_input_embeddings().register_forward_pre_hook(read)
