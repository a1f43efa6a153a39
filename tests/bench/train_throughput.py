"""Real tokens per second, memory and loss curve of our training, and of TRL on the same examples.

    python tests/bench/train_throughput.py                      the configurations of `OURS`
    python tests/bench/train_throughput.py --trl                TRL beside them, if it is installed
    python tests/bench/train_throughput.py --only fast-32 --model tinyllama-1.1b --seq 2048
    python tests/bench/train_throughput.py --curve              200 steps against the plain reference
    python tests/bench/train_throughput.py --set precision=bf16-master,micro_batch=16,compile=1
    python tests/bench/train_throughput.py --tiny               everything in small, on a processor

Every configuration runs in a process of its own. Rows go to standard output as they are known, and
with --json FILE or --csv FILE to a file. Weights are random; data is the synthetic set (prompt mean
107, response mean 258 tokens) or, with --data gpteacher, ../shared/data/gpteacher_codegen.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

OURS: dict[str, dict[str, Any]] = {
    "fast-32": {"precision": "bf16-master", "micro_batch": 32},
    "mixed-32": {"precision": "bf16-mixed", "micro_batch": 32},
    "fast-16": {"precision": "bf16-master", "micro_batch": 16},
    "fast-8": {"precision": "bf16-master", "micro_batch": 8},
    "mixed-8": {"precision": "bf16-mixed", "micro_batch": 8},
    "fast-8-chunked": {"precision": "bf16-master", "micro_batch": 8, "loss": "chunked"},
    "fast-8-selective": {
        "precision": "bf16-master",
        "micro_batch": 8,
        "checkpointing": "selective",
    },
    "fast-8-full": {"precision": "bf16-master", "micro_batch": 8, "checkpointing": "full"},
    "mixed-8-eager": {"precision": "bf16-mixed", "micro_batch": 8, "compile": False},
    "mixed-8-sdpa": {"precision": "bf16-mixed", "micro_batch": 8, "attention": "sdpa"},
}
BASE: dict[str, Any] = {
    "precision": "bf16-master", "checkpointing": "none", "attention": "varlen", "loss": "response",
    "packing": True, "compile": True, "micro_batch": 8, "accumulation": 1,
}  # fmt: skip
TRL: dict[str, dict[str, Any]] = {
    "trl-default": {"steps": 24},
    "trl-no-checkpointing": {"gradient_checkpointing": False, "steps": 40},
    "trl-best": {"gradient_checkpointing": False, "packing": True, "attn": "varlen", "low": True},
}
COLUMNS = (
    "name", "model", "data", "seq", "rows", "tokens_per_s", "mfu_fraction", "step_s", "first_step_s",
    "peak_allocated_bytes", "peak_reserved_bytes", "fill_fraction", "loss_first", "loss_last", "status",
)  # fmt: skip
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

    folder = next(path for path in SHARED if path.is_dir())
    tokenizer = load_tokenizer(folder / "gpt2-tokenizer")
    found = prepare(
        folder / "gpteacher_codegen.json", tokenizer=tokenizer, seq_len=args.seq, skip_bad=9999
    )
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
    from sftplan.facts.strategy import Attention, Checkpointing, Loss, Optimizer, Precision
    from sftplan.train.attention import choose_kernel
    from sftplan.train.compiled import loss_functions, prepare_blocks
    from sftplan.train.inputs import Layout
    from sftplan.train.model import build_model, product_dtype
    from sftplan.train.settings import Settings
    from sftplan.train.step import Stepper
    from sftplan.train.update import Update

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, shape = Precision(knobs["precision"]), shape_of(args)
    config = config_of(args, shape, knobs.get("dropout"))
    kernel = choose_kernel(
        Attention(knobs["attention"]), device=device, low=product_dtype(precision), config=config
    )
    model = build_model(config, precision=precision, attention=kernel.name, device=device)
    prepare_blocks(
        model, checkpointing=Checkpointing(knobs["checkpointing"]), compiled=knobs["compile"]
    )
    response, chunk = loss_functions(compiled=knobs["compile"])
    settings = Settings(learning_rate=args.learning_rate)
    sharing = Sharing(micro_batch=knobs["micro_batch"], accumulation=knobs["accumulation"])
    data = batches(
        examples_of(args, shape.vocab_size), seq_len=args.seq, sharing=sharing,
        packing=knobs["packing"], epochs=1.0, seed=1,
    )  # fmt: skip
    stepper = Stepper(
        model=model, precision=precision, loss=Loss(knobs["loss"]), max_grad_norm=1.0, device=device,
        update=Update(model, precision=precision, kind=Optimizer.ADAMW, settings=settings),
        response=response, chunk=chunk,
    )  # fmt: skip
    return stepper, data, Layout(flat=kernel.flat, packed=knobs["packing"])


def steps_for(data: Any, layout: Any, device: Any, count: int) -> Any:
    """`count` steps, epoch after epoch."""
    from dataclasses import replace

    from sftplan.train.inputs import prefetched

    epochs = math.ceil(count / data.steps_per_epoch)
    source = prefetched(replace(data, epochs=float(epochs)), layout, device, start=(0, 0))
    return (ready for ready, _ in zip(source, range(count), strict=False))


def ours(args: argparse.Namespace, name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """One configuration of ours: speed after warm-up, memory, losses."""
    import torch

    from sftplan.train.model import without_pad_token
    from sftplan.train.schedule import Schedule
    from sftplan.train.step import Reading, train_step

    stepper, data, layout = build(args, knobs)
    cuda = stepper.device.type == "cuda"
    rate = Schedule(
        peak=args.learning_rate,
        floor=0.0,
        warmup_steps=min(10, args.steps // 4),
        num_steps=args.steps,
    )
    readings, first, tokens, start = [], 0.0, 0, time.perf_counter()
    begun = start
    with without_pad_token(stepper.model):
        for number, ready in enumerate(steps_for(data, layout, stepper.device, args.steps)):
            step = ready.step
            outcome = train_step(
                stepper, ready.inputs, num_targets=step.num_targets, learning_rate=rate(number)
            )
            readings.append(Reading(outcome.loss, outcome.grad_norm))
            if number > 0:
                readings[number - 1].values()  # one step behind, as the loop reads them
            if number == 0:
                readings[0].values()
                first = time.perf_counter() - begun
            if number == args.warmup - 1:
                readings[number].values()
                start, tokens = time.perf_counter(), 0
            elif number >= args.warmup:
                tokens += step.num_tokens
    losses = [reading.values()[0] for reading in readings]
    seconds = time.perf_counter() - start
    steps = max(len(losses) - args.warmup, 1)
    rows = knobs["micro_batch"] * knobs["accumulation"]
    shape = shape_of(args)
    return {
        "tokens_per_s": tokens / seconds, "step_s": seconds / steps, "first_step_s": first,
        "mfu_fraction": flops_per_token(shape, args.seq) * tokens / seconds / PEAK_FLOPS if cuda else None,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "fill_fraction": tokens / steps / (rows * data.row_len), "rows": rows,
        "losses": losses, "grad_norms": [reading.values()[1] for reading in readings],
    }  # fmt: skip


def reference(args: argparse.Namespace, knobs: dict[str, Any]) -> dict[str, Any]:
    """The plain loop: fp32 weights, autocast, transformers' own forward, loss and mask; same batches."""
    import torch

    from sftplan.train.inputs import Layout
    from sftplan.train.schedule import Schedule
    from sftplan.train.step import model_inputs

    plain = knobs | {
        "precision": "bf16-mixed",
        "attention": "sdpa",
        "compile": False,
        "loss": "full",
    }
    stepper, data, _ = build(args, plain)
    model, device = stepper.model, stepper.device
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    rate = Schedule(
        peak=args.learning_rate,
        floor=0.0,
        warmup_steps=min(10, args.steps // 4),
        num_steps=args.steps,
    )
    losses, norms = [], []
    layout = Layout(flat=False, packed=True)
    for number, ready in enumerate(steps_for(data, layout, device, args.steps)):
        total = 0.0
        for batch, inputs in zip(ready.step.micro_batches, ready.inputs, strict=True):
            labels = torch.frombuffer(batch.labels(), dtype=torch.int64).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(**model_inputs(inputs)).logits
            scores = logits.float().view(-1, logits.shape[-1])
            loss = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
            loss = loss / ready.step.num_targets
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {
        "losses": losses,
        "grad_norms": norms,
        "rows": knobs["micro_batch"] * knobs["accumulation"],
    }


def trl(args: argparse.Namespace, name: str, options: dict[str, Any]) -> dict[str, Any]:
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
    if attention == "varlen":
        register(torch.bfloat16)
        from transformers import AttentionInterface

        attention = "flash_attention_2_varlen"  # TRL packs without padding only under such a name
        AttentionInterface.register(attention, AttentionInterface()[VARLEN])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=low, attn_implementation=attention)
    steps = options.pop("steps", 24)
    warmup = max(steps // 3, 1)
    clock: list[float] = []
    seen: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=args.seq, max_steps=steps, bf16=cuda, use_cpu=not cuda,
        per_device_train_batch_size=2 if args.tiny else 8, report_to="none", save_strategy="no",
        logging_steps=1000, seed=1, **options,
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


def one(args: argparse.Namespace, name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """The row of one configuration; what goes wrong is its status."""
    row: dict[str, Any] = {"name": name, "model": args.model, "data": args.data, "seq": args.seq}
    try:
        if name.startswith("trl"):
            row |= trl(args, name, knobs)
        elif name == "reference":
            row |= reference(args, knobs)
        else:
            row |= ours(args, name, knobs)
        losses = row.get("losses") or [None]
        row |= {"loss_first": losses[0], "loss_last": losses[-1], "status": "ok"}
    except Exception as error:  # the other configurations still count
        import traceback

        traceback.print_exc()
        row["status"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def apart(args: argparse.Namespace, name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """`one` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--one",
            name,
            json.dumps(knobs),
            file.name,
        ]
        env = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
        code = subprocess.run(command, env=env, check=False).returncode
        text = Path(file.name).read_text(encoding="utf-8")
    return json.loads(text) if text else {"name": name, "status": f"ended with code {code}"}


def wanted(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Names and knobs of what is to be run."""
    if args.set:
        given = dict(pair.split("=", 1) for pair in args.set.split(","))
        values = {k: json.loads(v.lower()) if v.lower() in ("true", "false") or v.replace(".", "").isdigit() else v
                  for k, v in given.items()}  # fmt: skip
        for switch in ("compile", "packing"):
            if switch in values:
                values[switch] = bool(values[switch])
        return {args.set: BASE | values}
    if args.curve:
        knobs = BASE | {"micro_batch": 8, "dropout": 0.0}
        mixed = knobs | {"precision": "bf16-mixed"}
        return {"curve-master": knobs, "curve-mixed": mixed, "reference": knobs}
    found = {name: BASE | knobs for name, knobs in OURS.items()}
    found |= TRL if args.trl else {}
    return {k: v for k, v in found.items() if not args.only or k in args.only.split(",")}


def compare(rows: list[dict[str, Any]]) -> None:
    """The curves beside the reference's: mean and largest difference of the loss."""
    plain = next((row for row in rows if row["name"] == "reference" and "losses" in row), None)
    for row in rows if plain else ():
        if row is plain or "losses" not in row:
            continue
        apart = [a - b for a, b in zip(row["losses"], plain["losses"], strict=True)]  # type: ignore[index]
        tail = apart[-len(apart) // 4 :]
        print(
            f"{row['name']:16} minus reference: mean {statistics.fmean(apart):+.5f}, last quarter "
            f"{statistics.fmean(tail):+.5f}, largest {max(map(abs, apart)):.5f}; "
            f"loss {plain['losses'][0]:.4f} -> {plain['losses'][-1]:.4f}",  # type: ignore[index]
            flush=True,
        )


def show(row: dict[str, Any]) -> None:
    """One line per configuration."""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        value = row.get(key)
        return "-" if value is None else format(value * scale, form)

    print(
        f"{row['name']:22} {number('tokens_per_s', ',.0f'):>9} tokens/s  MFU {number('mfu_fraction', '.1f', 100):>5} %"
        f"  step {number('step_s', '.4f'):>7} s  first {number('first_step_s', '.1f'):>5} s"
        f"  {number('peak_allocated_bytes', '.2f', 2**-30):>6} / {number('peak_reserved_bytes', '.2f', 2**-30):>6} GiB"
        f"  loss {number('loss_first', '.4f')} -> {number('loss_last', '.4f')}  {row['status']}",
        flush=True,
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="gpt2-large")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--data", choices=["synthetic", "gpteacher"], default="synthetic")
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--only", help="names of configurations, with commas")
    parser.add_argument(
        "--set", help="knobs of one configuration, as precision=bf16-mixed,micro_batch=8"
    )
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.curve:
        args.data, args.steps = "gpteacher", 200
    if args.tiny:
        args.model = "gpt2" if args.model == "gpt2-large" else args.model
        args.seq, args.examples, args.steps, args.warmup = 256, 400, 6, 2
    return args


def main() -> None:
    """Run what is wanted, write the rows."""
    args = arguments()
    if args.one:
        name, knobs, file = args.one
        Path(file).write_text(json.dumps(one(args, name, json.loads(knobs))), encoding="utf-8")
        return
    rows = []
    for name, knobs in wanted(args).items():
        rows.append(apart(args, name, knobs))
        show(rows[-1])
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if args.csv:
            with Path(args.csv).open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", restval="")
                writer.writeheader()
                writer.writerows(rows)
    compare(rows)


if __name__ == "__main__":
    main()
