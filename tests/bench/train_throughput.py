"""Real tokens per second, memory and loss curve of our training, and of TRL on the same examples.

    python tests/bench/train_throughput.py                      the configurations of `OURS`
    python tests/bench/train_throughput.py --trl                TRL beside them, if it is installed
    python tests/bench/train_throughput.py --sides              fast-32 and fast-8 beside TRL, 8 minutes at most
    python tests/bench/train_throughput.py --only fast-32 --model tinyllama-1.1b --seq 2048
    python tests/bench/train_throughput.py --curve              200 steps against the plain reference
    python tests/bench/train_throughput.py --set precision=bf16-master,micro_batch=16,compile=1
    python tests/bench/train_throughput.py --tiny               everything in small, on a processor

Every configuration runs in a process of its own. Rows go to standard output as they are known, and
with --json FILE or --csv FILE to a file (with --curve, the CSV has a line per step). Weights are
random; data is the synthetic set (prompt mean 107, response mean 258 tokens) or, with
--data gpteacher, gpteacher_codegen.json of --data-folder, tokenised with the GPT-2 tokenizer there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_build import (
    PEAK_FLOPS,
    build,
    flops_per_token,
    schedule_of,
    shape_of,
    steps_for,
)
from train_curve import CONTROL, PLAIN, compare, write_curves
from train_curve import OURS as CURVE
from train_peers import reference, trl

# fmt: off
OURS: dict[str, dict[str, Any]] = {
    "fast-32": {"precision": "bf16-master", "micro_batch": 32},
    "fast-32x2": {"precision": "bf16-master", "micro_batch": 32, "accumulation": 2},
    "mixed-32": {"precision": "bf16-mixed", "micro_batch": 32},
    "fast-16": {"precision": "bf16-master", "micro_batch": 16},
    "fast-8": {"precision": "bf16-master", "micro_batch": 8},
    "mixed-8": {"precision": "bf16-mixed", "micro_batch": 8},
    "fast-8-chunked": {"precision": "bf16-master", "micro_batch": 8, "loss": "chunked"},
    "fast-8-selective": {"precision": "bf16-master", "micro_batch": 8, "checkpointing": "selective"},
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
    "trl-best-32": {"gradient_checkpointing": False, "packing": True, "attn": "varlen", "low": True, "rows": 32},
}
SIDES = ("fast-32x2", "fast-32", "fast-8", "trl-best", "trl-default", "trl-best-32")
SIDES_S = 460.0  # for all of them; what has not ended by then is ended
CURVE_S = 235.0
GRACE_S = 10.0  # to write the row after the limit
# fmt: on
COLUMNS = (
    "name",
    "model",
    "data",
    "seq",
    "rows",
    "tokens_per_s",
    "mfu_fraction",
    "step_s",
    "first_step_s",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "fill_fraction",
    "loss_first",
    "loss_last",
    "status",
)  # fmt: skip


def ours(args: argparse.Namespace, knobs: dict[str, Any]) -> dict[str, Any]:
    """One configuration of ours: speed after warm-up, memory, losses."""
    import torch

    from sftplan.train.model import without_pad_token
    from sftplan.train.step import Reading, train_step

    stepper, data, layout = build(args, knobs)
    cuda = stepper.device.type == "cuda"
    rate = schedule_of(args)
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


def one(args: argparse.Namespace, name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """The row of one configuration; what goes wrong is its status."""
    row: dict[str, Any] = {"name": name, "model": args.model, "data": args.data, "seq": args.seq}
    try:
        if name.startswith("trl"):
            row |= trl(args, knobs)
        elif name.startswith(PLAIN):
            row |= reference(args, knobs)
        else:
            row |= ours(args, knobs)
        losses = row.get("losses") or [None]
        row |= {"loss_first": losses[0], "loss_last": losses[-1], "status": "ok"}
    except Exception as error:  # the other configurations still count
        import traceback

        traceback.print_exc()
        row["status"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def apart(
    args: argparse.Namespace, name: str, knobs: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    """`one` in a process of its own, ended after `limit_s` seconds."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        own = ["--one", name, json.dumps(knobs), file.name]
        env = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *own], env=env, start_new_session=True
        )
        try:
            ended = f"ended with code {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            ended = f"ended after {limit_s:.0f} s"
        text = Path(file.name).read_text(encoding="utf-8")
    return json.loads(text) if text else {"name": name, "status": ended}


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
        curves = {CURVE: knobs, PLAIN: knobs, CONTROL: knobs | {"reversed": True}}
        extra = {"curve-mixed": knobs | {"precision": "bf16-mixed"}}
        return {
            k: v
            for k, v in (curves | extra).items()
            if k in (args.only or ",".join(curves)).split(",")
        }
    found = {name: BASE | knobs for name, knobs in OURS.items()}
    found |= TRL if args.trl or args.sides else {}
    only = args.only.split(",") if args.only else SIDES if args.sides else tuple(found)
    return {name: found[name] for name in only}


def ratios(rows: list[dict[str, Any]]) -> None:
    """Our speeds over TRL's."""
    speeds = {row["name"]: row["tokens_per_s"] for row in rows if row.get("tokens_per_s")}
    for ours_name, ours_speed in speeds.items():
        for name, speed in speeds.items():
            if name.startswith("trl") and not ours_name.startswith("trl"):
                print(f"{ours_name} is {ours_speed / speed:.2f} × {name}", flush=True)


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
    parser.add_argument("--data-folder", help="with gpteacher_codegen.json and gpt2-tokenizer/")
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--steps", type=int, help="30; 200 with --curve")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, help="1e-5; 2e-4 with --curve")
    parser.add_argument("--only", help="names of configurations, with commas")
    parser.add_argument(
        "--set", help="knobs of one configuration, as precision=bf16-mixed,micro_batch=8"
    )
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--sides", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.curve:
        args.data = "gpteacher"
    args.steps = args.steps or (200 if args.curve else 30)
    args.learning_rate = args.learning_rate or (2e-4 if args.curve else 1e-5)
    if args.tiny:
        args.model = "gpt2" if args.model == "gpt2-large" else args.model
        args.seq, args.examples, args.warmup = 256, 400, 2
        args.steps = 40 if args.curve else 6
    return args


def main() -> None:
    """Run what is wanted, write the rows."""
    args = arguments()
    if args.one:
        name, knobs, file = args.one
        Path(file).write_text(json.dumps(one(args, name, json.loads(knobs))), encoding="utf-8")
        return
    rows: list[dict[str, Any]] = []
    whole = SIDES_S if args.sides else CURVE_S if args.curve else float("inf")
    end = time.monotonic() + whole
    for name, knobs in wanted(args).items():
        left = min(end - time.monotonic(), 3600.0)
        rows.append(
            apart(args, name, knobs, left)
            if left > GRACE_S
            else {"name": name, "status": "no time left"}
        )
        show(rows[-1])
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if args.csv:
            write_table(rows, Path(args.csv), curves=args.curve)
    ratios(rows)
    compare(rows)


def write_table(rows: list[dict[str, Any]], file: Path, *, curves: bool) -> None:
    """A line per configuration, or per step of the curves."""
    if curves:
        write_curves(rows, file)
        return
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
