"""Steppers over tiny models on the processor, and their data."""

# ruff: noqa: TID253
from __future__ import annotations

from array import array
from typing import Any

import torch
import transformers

from sftplan.data.batches import Batches, Sharing, batches
from sftplan.data.conversation import Place
from sftplan.data.mask import Example
from sftplan.facts.strategy import Loss, Optimizer, Precision
from sftplan.train.inputs import Inputs, Layout, to_device
from sftplan.train.model import build_model
from sftplan.train.settings import Settings
from sftplan.train.step import Stepper, scaled_loss
from sftplan.train.update import Update

CPU = torch.device("cpu")
VOCAB = 99  # not a multiple of 64: the product is padded, the weight is not
ROWS, PACKED = Layout(flat=False, packed=False), Layout(flat=False, packed=True)
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB, n_positions=64, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": transformers.LlamaConfig(**LLAMA),
    "gemma-2": transformers.Gemma2Config(
        **LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
    "phi": transformers.PhiConfig(**LLAMA, bos_token_id=0, eos_token_id=0),
}  # fmt: skip


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        prompt, answer = torch.randint(2, 12, (2,), generator=generator).tolist()
        ids = torch.randint(1, VOCAB, (prompt + answer,), generator=generator).tolist()
        place = Place(file="a.jsonl", row=number + 1, line=number + 1)
        trained = bytes(prompt) + b"\1" * answer
        found.append(Example(input_ids=array("i", ids), trained=trained, place=place))
    return found


def made(
    name: str = "gpt2",
    *,
    precision: Precision = Precision.FP32,
    loss: Loss = Loss.RESPONSE,
    implementation: str = "sdpa",
    **options: Any,
) -> Stepper:
    """A stepper over a tiny model; the same weights every time."""
    model = build_model(CONFIGS[name], precision=precision, attention=implementation, device=CPU)
    settings = Settings(learning_rate=1e-2, weight_decay=0.1)
    update = Update(model, precision=precision, kind=Optimizer.ADAMW, settings=settings)
    return Stepper(
        model=model, update=update, precision=precision, loss=loss, max_grad_norm=1.0, device=CPU,
        **options,
    )  # fmt: skip


def data(*, packing: bool, micro_batch: int = 4, accumulation: int = 1, **options: Any) -> Batches:
    """The examples in rows of 64 tokens."""
    sharing = Sharing(micro_batch=micro_batch, accumulation=accumulation)
    return batches(examples(), seq_len=64, sharing=sharing, packing=packing, **options)


def first(source: Batches, layout: Layout, index: int = 0) -> tuple[list[Inputs], int]:
    """The passes of a step and its targets."""
    step = source.step(0, index)
    return [to_device(batch, layout, CPU) for batch in step.micro_batches], step.num_targets


def gradients(stepper: Stepper, passes: list[Inputs], num_targets: int) -> tuple[float, list[Any]]:
    """Loss and gradients before any clipping."""
    total = 0.0
    for inputs in passes:
        loss = scaled_loss(stepper, inputs, torch.tensor(1 / num_targets))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    found = [p.grad.clone() for p in stepper.update.parameters if p.grad is not None]
    stepper.update.clear()
    return total, found


def by_hand(model: Any, chosen: list[Example]) -> torch.Tensor:
    """Mean of -log softmax at the answers' tokens, each example alone, in plain Python."""
    parts = []
    for example in chosen:
        ids = torch.tensor(list(example.input_ids))
        logs = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        parts += [-logs[at - 1, ids[at]] for at in range(len(ids)) if example.trained[at]]
    return torch.stack(parts).mean()
