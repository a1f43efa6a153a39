"""Kernels and clocks of compiled steps: `python h200_compiled.py FOLDER [--seconds 300] [--part 0/2] [--tiny]`.

For each case: seconds of a step; of the host alone, issuing a step to an idle GPU, by phase; and the kernels
of one step in a table. One JSON file a case, and a line each on standard output.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from train_build import build, schedule_of, steps_for

from sftplan.train.model import without_pad_token
from sftplan.train.step import Reading, train_step

WARMUP, TIMED, HOSTED = 5, 8, 5
FAST = {
    "precision": "bf16-master",
    "attention": "varlen",
    "loss": "response",
    "packing": True,
    "compile": True,
    "accumulation": 1,
}
PLAIN = FAST | {"attention": "sdpa", "packing": False}


def case(
    model: str, seq: int, rows: int, checkpointing: str = "none", **knobs: Any
) -> dict[str, Any]:
    """A case as a dictionary."""
    return {
        "model": model,
        "seq": seq,
        "knobs": FAST | {"micro_batch": rows, "checkpointing": checkpointing} | knobs,
    }


CASES = [
    case("gpt2-large", 1024, 32),
    case("llama-3.2-1b", 2048, 8),
    case("gpt2-large", 1024, 8),
    case("tinyllama-1.1b", 2048, 4),
    case("gpt2-large", 1024, 8, "selective", loss="chunked"),
    case("qwen3-0.6b", 1024, 8),
    case("gpt2-large", 1024, 2),
    case("qwen2.5-0.5b", 2048, 8, "selective", loss="chunked"),
    case("gpt2", 1024, 16),
    case("smollm2-360m", 1024, 8),
    case("gpt2-xl", 1024, 4),
    case("pythia-410m", 1024, 16),
    case("gpt2-large", 1024, 8, precision="bf16-mixed"),
    case("qwen3-0.6b", 2048, 4, "full"),
    case("llama-3.2-1b", 1024, 4, precision="bf16-mixed"),
    case("opt-1.3b", 1024, 8),
    case("gpt2-large", 1024, 8, attention="sdpa", packing=False),
    case("qwen2.5-0.5b", 512, 32, attention="sdpa", packing=False),
    case("gpt2-medium", 512, 16, "selective"),
    case("llama-3.2-3b", 2048, 4, "selective", loss="chunked"),
    case("pythia-410m", 2048, 8, "full", precision="bf16-mixed"),
    case("tinyllama-1.1b", 2048, 16),
    case("smollm2-135m", 1024, 16),
    case("qwen2.5-1.5b", 2048, 4),
]  # fmt: skip


def measured(chosen: dict[str, Any], *, tiny: bool) -> dict[str, Any]:
    """Everything of a case."""
    knobs = dict(chosen["knobs"])
    args = argparse.Namespace(
        model=chosen["model"], seq=256 if tiny else chosen["seq"], tiny=tiny, data="synthetic", examples=4000 if not tiny else 200,
        learning_rate=1e-5, steps=WARMUP + TIMED + HOSTED + 4, data_folder=None,
    )  # fmt: skip
    if tiny:
        knobs["micro_batch"] = 2
    stepper, data, layout = build(args, knobs)
    cuda, rate = stepper.device.type == "cuda", schedule_of(args)
    steps = iter(steps_for(data, layout, stepper.device, args.steps))

    def step(mark: Any = None) -> Any:
        from dataclasses import replace

        ready = next(steps)
        one = stepper if mark is None else replace(stepper, mark=mark)
        return train_step(
            one, ready.inputs, num_targets=ready.step.num_targets, learning_rate=rate(1)
        ), ready

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    begun = time.perf_counter()
    with without_pad_token(stepper.model):
        step()
        wait()
        first_s = time.perf_counter() - begun
        for _ in range(WARMUP - 1):
            step()
        wait()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        readings, start, tokens = [], time.perf_counter(), 0
        for number in range(TIMED):
            outcome, ready = step()
            tokens += ready.step.num_tokens
            readings.append(Reading(outcome.loss))
            if number:
                readings[number - 1].values()
        wait()
        step_s = (time.perf_counter() - start) / TIMED
        peaks = (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else None
        )
        hosts = []
        for _ in range(HOSTED):
            wait()
            marks: list[tuple[str, float]] = []
            step(lambda name, marks=marks: marks.append((name, time.perf_counter())))
            found: dict[str, float] = {}
            for (name, at), (_, after) in pairwise(marks):
                found[name] = found.get(name, 0.0) + after - at
            hosts.append(found)
        wait()
        with torch.profiler.profile() as profile:
            step()
            wait()
    kernels = [
        (e.key[:240], e.count, round(e.self_device_time_total, 1))
        for e in profile.key_averages()
        if "CUDA" in str(e.device_type) and not e.key.startswith(("Optimizer.", "ProfilerStep"))
    ]
    kernels.sort(key=lambda k: -k[2])
    return {
        **chosen, "step_s": step_s, "first_s": first_s, "tokens_per_s": tokens / TIMED / step_s, "peaks": peaks,
        "host_s": {name: statistics.median(h[name] for h in hosts) for name in hosts[0]},
        "kernels_s": sum(k[2] for k in kernels) / 1e6, "num_kernels": sum(k[1] for k in kernels), "kernels": kernels,
    }  # fmt: skip


def main() -> None:
    """One case after the other, graphs and memory dropped between them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    part, parts = map(int, args.part.split("/"))
    args.folder.mkdir(parents=True, exist_ok=True)
    out = args.folder / f"compiled_{part}.jsonl"
    for chosen in CASES[part::parts]:
        if time.monotonic() + 25 > deadline:
            break
        try:
            found = measured(chosen, tiny=args.tiny)
        except Exception:
            traceback.print_exc()
            continue
        with out.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        knobs = chosen["knobs"]
        host = sum(found["host_s"].values())
        print(
            f"{chosen['model']:16} {chosen['seq']}x{knobs['micro_batch']:<3} {knobs['precision'][5:]:7} {knobs['checkpointing']:9} {knobs['loss']:8}"
            f" step {found['step_s'] * 1e3:7.1f} ms  host {host * 1e3:6.1f}  kernels {found['kernels_s'] * 1e3:7.1f} ({found['num_kernels']})"
            f"  {found['tokens_per_s']:9,.0f} tok/s  first {found['first_s']:.1f} s",
            flush=True,
        )  # fmt: skip
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
