"""Passes replayed as CUDA graphs against the same passes issued one by one; on a GPU."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

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
from sftplan.train.step import Stepper, train_step
from sftplan.train.update import Update

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEQ_LEN, STEPS = 256, 6
CASES = [
    ("gpt2", Precision.BF16_MASTER, Checkpointing.NONE, Loss.RESPONSE),
    ("gpt2", Precision.BF16_MIXED, Checkpointing.FULL, Loss.RESPONSE),
    ("gpt2", Precision.BF16_MASTER, Checkpointing.SELECTIVE, Loss.CHUNKED),
    ("qwen3-0.6b", Precision.BF16_MASTER, Checkpointing.NONE, Loss.FULL),
    ("pythia-70m", Precision.BF16_MASTER, Checkpointing.NONE, Loss.RESPONSE),
    ("opt-125m", Precision.FP16_MIXED, Checkpointing.NONE, Loss.CHUNKED),
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


def losses(
    case: tuple[Any, ...], *, captured: bool, release_at: int | None = None
) -> list[list[float]]:
    """Loss and norm of each step; a fresh model every time."""
    name, precision, checkpointing, loss = case
    torch._dynamo.reset()
    device = torch.device("cuda")
    config = config_of(builtin(name))
    config.num_hidden_layers = 3
    kernel = choose_kernel(
        Attention.VARLEN, device=device, low=product_dtype(precision), config=config
    )
    model = build_model(config, precision=precision, attention=kernel.name, device=device)
    prepare_blocks(model, checkpointing=checkpointing, compiled=True)
    response, chunk = loss_functions(compiled=True)
    update = Update(model, precision=precision, kind=Optimizer.ADAMW, settings=Settings())
    stepper = Stepper(
        model=model, update=update, precision=precision, loss=loss, max_grad_norm=1.0, device=device,
        response=response, chunk=chunk, captured=CapturedPasses(update.parameters) if captured else None,
    )  # fmt: skip
    data = batches(
        examples(400, config.vocab_size), seq_len=SEQ_LEN, sharing=Sharing(micro_batch=2, accumulation=3),
        packing=True, epochs=1.0, seed=1,
    )  # fmt: skip
    torch.manual_seed(11)
    found = []
    for number in range(STEPS):
        if number == release_at:
            stepper.release()
        step = data.step(0, number)
        inputs = [to_device(b, Layout(flat=True, packed=True), device) for b in step.micro_batches]
        seen: list[str] = []
        marked = replace(stepper, mark=seen.append)
        outcome = train_step(marked, inputs, num_targets=step.num_targets, learning_rate=1e-3)
        assert seen == ["forward", "backward"] * 3 + ["optimizer", "end"]
        found.append([float(outcome.loss), float(outcome.grad_norm)])
    return found


@pytest.mark.filterwarnings("default")  # the compiler itself warns
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_replayed_steps_are_the_same_steps_to_the_bit(case: Sequence[Any]) -> None:
    assert losses(tuple(case), captured=True) == losses(tuple(case), captured=False)


@pytest.mark.filterwarnings("default")
def test_what_was_released_is_captured_again() -> None:
    found = losses(CASES[0], captured=True, release_at=4)
    assert found == losses(CASES[0], captured=False)
