"""What our training is compared with: TRL's trainer, and a plain loop of transformers and PyTorch."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING, Any

from train_build import (
    PEAK_FLOPS,
    build,
    config_of,
    examples_of,
    flops_per_token,
    schedule_of,
    shape_of,
    steps_for,
)

if TYPE_CHECKING:
    import argparse


def reference(args: argparse.Namespace, knobs: dict[str, Any]) -> dict[str, Any]:
    """The plain loop on the same rows in the same order, from the same weights.

    transformers' model, uncompiled, with fp32 weights under bf16 autocast, its own loss over all
    positions, SDPA with an explicit mask of documents, torch's AdamW as it comes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    stepper, data, layout = build(args, knobs)
    device, config = stepper.device, config_of(args, shape_of(args), knobs.get("dropout"))
    weights = {name: value.float() for name, value in stepper.model.state_dict().items()}
    del stepper
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    model.load_state_dict(weights)
    del weights
    named = list(model.train().named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    rate = schedule_of(args)
    losses, norms = [], []
    begun = time.perf_counter()
    for number, ready in enumerate(steps_for(data, layout, device, args.steps)):
        total = torch.zeros((), device=device)
        for batch in ready.step.micro_batches:
            loss = _plain_loss(
                model, batch, ready.step.num_targets, backwards=knobs.get("reversed", False)
            )
            loss.backward()
            total += loss.detach()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {
        "losses": torch.stack(losses).tolist(),
        "grad_norms": torch.stack(norms).tolist(),
        "step_s": (time.perf_counter() - begun) / len(losses),
        "rows": knobs["micro_batch"] * knobs["accumulation"],
    }


def _plain_loss(model: Any, batch: Any, num_targets: int, *, backwards: bool) -> Any:
    """transformers' own loss; a token attends to those before it in its own document."""
    import torch

    device = model.device
    shape = (batch.shape.rows, batch.shape.row_len)
    ids, positions, labels = (
        torch.frombuffer(values, dtype=torch.int64).view(shape).to(device)
        for values in (batch.input_ids, batch.positions, batch.labels())
    )
    if backwards:
        ids, positions, labels = ids.flip(0), positions.flip(0), labels.flip(0)
    document = (positions == 0).cumsum(1)
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    mask = (document[:, :, None] == document[:, None, :]) & causal
    with torch.autocast(device.type, torch.bfloat16):
        return model(
            input_ids=ids, position_ids=positions, attention_mask=mask[:, None], use_cache=False,
            labels=labels, shift_labels=labels, num_items_in_batch=num_targets,
        ).loss  # fmt: skip


def trl(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer on the same examples, counted in the same real tokens."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    from sftplan.train.attention import VARLEN, register

    options = dict(options)
    shape, cuda = shape_of(args), torch.cuda.is_available()
    vocab = shape.vocab_size
    last = f"t{vocab - 1}"
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last, pad_token=last)
    rows = [
        {"input_ids": list(e.input_ids), "completion_mask": list(e.trained)}
        for e in examples_of(args, vocab)
    ]
    low = torch.bfloat16 if options.pop("low", False) else torch.float32
    config = config_of(args, shape, None)
    attention = options.pop("attn", "sdpa")
    if attention == "varlen":  # TRL hands the documents' boundaries down to it
        register(torch.bfloat16)
        attention = VARLEN if cuda else "sdpa"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=low, attn_implementation=attention)
    steps = options.pop("steps", 24)
    steps = 4 if args.tiny else steps
    warmup = max(steps // 3, 1)
    rows_per_step = options.pop("rows", 8)
    clock: list[float] = []
    seen: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=args.seq, max_steps=steps, bf16=cuda, use_cpu=not cuda,
        per_device_train_batch_size=2 if args.tiny else rows_per_step, report_to="none", save_strategy="no",
        logging_steps=1000, disable_tqdm=True, seed=1, **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    plain = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        seen.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return plain(model, inputs, *rest, **named)

    trainer.training_step = counted
    begun = time.perf_counter()
    trainer.train()
    seconds, tokens = clock[-1] - clock[warmup - 1], sum(seen[warmup:steps])
    return {
        "tokens_per_s": tokens / seconds, "step_s": seconds / (steps - warmup),
        "first_step_s": clock[0] - begun, "rows": settings.per_device_train_batch_size,
        "mfu_fraction": flops_per_token(shape, args.seq) * tokens / seconds / PEAK_FLOPS if cuda else None,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }  # fmt: skip
