"""What the training benchmarks share: examples, shapes, the product's own step, its steps in order."""

from __future__ import annotations

import math
import random
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

OWN_KNOBS = ("dropout", "reversed")  # of the benchmark, not of a plan
PEAK_FLOPS = 989e12  # H200 and H100 SXM, dense bf16
SHARED = (Path("../shared/data"), Path("shared/data"), Path(__file__).parents[3] / "shared/data")


def synthetic(count: int, vocab: int, seq: int) -> list[Any]:
    """Examples of random ids with lengths as in instruction data; always the same."""
    from sftplan.data.conversation import Place
    from sftplan.data.mask import Example

    draw = random.Random(7)
    found = []
    for number in range(count):
        prompt = max(4, min(seq // 2, int(draw.lognormvariate(4.4, 0.8))))
        answer = max(4, min(seq - prompt, int(draw.lognormvariate(5.2, 0.9))))
        ids = array("i", (draw.randrange(vocab) for _ in range(prompt + answer)))
        place = Place(file="synthetic", row=number + 1)
        found.append(Example(input_ids=ids, trained=bytes(prompt) + b"\1" * answer, place=place))
    return found


def examples_of(args: argparse.Namespace, vocab: int) -> list[Any]:
    """The examples that were asked for."""
    if args.data == "synthetic":
        return synthetic(args.examples, vocab, args.seq)
    from sftplan.data.locate import load_tokenizer
    from sftplan.data.prepare import prepare

    folder = Path(args.data_folder) if args.data_folder else next(p for p in SHARED if p.is_dir())
    found = prepare(
        folder / "gpteacher_codegen.json", tokenizer=load_tokenizer(folder / "gpt2-tokenizer"),
        seq_len=args.seq, skip_bad=9999,
    )  # fmt: skip
    return list(found.examples)[: args.examples]


def shape_of(args: argparse.Namespace) -> Any:
    """The model's shape; a narrow one with --tiny."""
    from dataclasses import replace

    from sftplan.facts.catalogue import builtin

    shape = builtin(args.model)
    return replace(shape, num_layers=2, hidden_size=64, num_heads=2) if args.tiny else shape


def config_of(args: argparse.Namespace, shape: Any, dropout: float | None) -> Any:
    """transformers' configuration."""
    from sftplan.train.model import config_of as full

    config = full(shape)
    for name in ("resid_pdrop", "embd_pdrop"):
        if dropout is not None and hasattr(config, name):
            setattr(config, name, dropout)
    if args.tiny:
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads = 2, 64, 2
        for name, value in (
            ("intermediate_size", 128),
            ("num_key_value_heads", 2),
            ("head_dim", 32),
        ):
            if hasattr(config, name):
                setattr(config, name, value)
    return config


def flops_per_token(shape: Any, seq: int) -> int:
    """The plan's convention: 6 per parameter in products, attention at the full T."""
    from sftplan.cost.compute import attention_flops_per_token, linear_flops_per_token

    return int(linear_flops_per_token(shape) + attention_flops_per_token(shape, seq))


def build(args: argparse.Namespace, knobs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Stepper, batches and layout of a configuration: the product's own step."""
    import torch

    from sftplan.data.batches import Sharing, batches
    from sftplan.facts.captured import is_captured, is_causal
    from sftplan.facts.strategy import Strategy
    from sftplan.plan.build import strategy_record
    from sftplan.plan.request import read_pins
    from sftplan.train.attention import choose_kernel
    from sftplan.train.inputs import Layout
    from sftplan.train.model import product_dtype
    from sftplan.train.session import build_stepper
    from sftplan.train.settings import Settings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pins = read_pins({name: value for name, value in knobs.items() if name not in OWN_KNOBS})
    strategy, shape = Strategy(**pins), shape_of(args)
    config = config_of(args, shape, knobs.get("dropout"))
    low = product_dtype(strategy.precision)
    captured = is_captured(strategy, shape, args.seq)
    kernel = choose_kernel(
        strategy.attention, device=device, low=low, config=config,
        causal=is_causal(strategy, shape, args.seq), captured=captured,
    )  # fmt: skip
    stepper = build_stepper(
        strategy_record(strategy, ()), config, kernel, Settings(learning_rate=args.learning_rate),
        device=device, deepspeed={},
    )  # fmt: skip
    sharing = Sharing(micro_batch=strategy.micro_batch, accumulation=strategy.accumulation)
    data = batches(
        examples_of(args, shape.vocab_size), seq_len=args.seq, sharing=sharing,
        packing=strategy.packing, epochs=1.0, seed=1,
    )  # fmt: skip
    return stepper, data, Layout(flat=kernel.flat, packed=strategy.packing)


def schedule_of(args: argparse.Namespace) -> Any:
    """A short warm-up, then the cosine to nothing at the last step."""
    from sftplan.train.schedule import Schedule

    warmup = min(10, args.steps // 4)
    return Schedule(peak=args.learning_rate, floor=0.0, warmup_steps=warmup, num_steps=args.steps)


def steps_for(data: Any, layout: Any, device: Any, count: int) -> Any:
    """`count` steps, epoch after epoch."""
    from dataclasses import replace

    from sftplan.train.inputs import prefetched

    epochs = math.ceil(count / data.steps_per_epoch)
    source = prefetched(replace(data, epochs=float(epochs)), layout, device, start=(0, 0))
    return (ready for ready, _ in zip(source, range(count), strict=False))
