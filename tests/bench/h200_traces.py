"""Allocator traces of few-layer models: every allocation with the line, autograd node and operator that made it.

`python h200_traces.py FOLDER WORKER WORKERS SECONDS [--expandable] [--match REGEX]` writes one FOLDER/NAME.jsonl.gz a case:
a header line (the case, the label table), then events [action, address, bytes, label] and phase marks, in order.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import re
import sys
import time
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import torch
from h200_loop import CUDA, Case, Step, build, clean, stat

OTHERS = ["tinyllama-1.1b", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "gemma-2b", "gemma-2-2b", "gemma-3-1b", "pythia-410m",
          "opt-125m", "phi-2", "phi-3-mini", "qwen3-30b-a3b", "mixtral"]  # fmt: skip
LARGE = "gpt2-large"
CASES = [
    *(Case(LARGE, 1024, mb, prec, ckpt) for ckpt, mb, prec in product((1, 0), (1, 8), ("bf16", "amp", "fp32", "fp16amp"))),
    *(Case(name, 1024, 2, prec, 1) for name, prec in product(OTHERS[3::-1], ("bf16", "amp"))),
    Case(LARGE, 1024, 4, "amp", 0, "sdpa", 2, 1.0), Case(LARGE, 1024, 2, "amp", 0, "eager"),
    Case(LARGE, 1024, 2, "bf16", 0, "eager"), Case(LARGE, 512, 2, "amp"), Case(LARGE, 1024, 2, "fp16amp", 0, "sdpa", 2, 1.0),
    *(Case(name, 1024, 2, prec) for name, prec in product(OTHERS, ("bf16", "amp"))),
]  # fmt: skip
EXPANDABLE = [Case(LARGE, 1024, 8, "amp"), Case(LARGE, 1024, 1, "bf16", 1)]
STEPS = 3

NODE = re.compile(
    r"(\w+Backward\w*|AccumulateGrad|CopySlices|InputBuffer|CopyBackwards)\b(?=.*(?:::apply|::accumulate|::add|$))"
)
NATIVE = re.compile(r"at::native::(?:\(anonymous namespace\)::)?(\w+)")
OP = re.compile(r"at::_ops::(\w+)::")
OTHER = re.compile(r"(\w*[wW]orkspace\w*|getCurrentCUDABlasHandle|InputBuffer::\w+|accumulateGrad|make_param_for_\w+|"
                   r"_fused_adam\w*|mha_\w+|pytorch_flash::\w+|clone_obey_contract|cached_cast)")  # fmt: skip


def python_frame(frame: dict[str, Any]) -> str:
    """`file.py:line function` of a Python frame."""
    return f"{frame['filename'].rsplit('/', 1)[-1]}:{frame['line']} {frame['name']}"


@functools.cache
def told(name: str) -> list[tuple[str, str]]:
    """What one C++ frame tells: an autograd node, an operator, a native function, or something else of interest."""
    text, facts = name[:400], []
    if "torch::autograd" in text and (m := NODE.search(text)):
        facts.append(("node", m.group(1)))
    facts += [
        (tag, m.group(1))
        for tag, pattern in (("op", OP), ("native", NATIVE), ("via", OTHER))
        if (m := pattern.search(text))
    ]
    return facts


def label(frames: list[dict[str, Any]]) -> str:
    """Innermost Python frame, innermost model frame, autograd node, operators, anything else that tells."""
    python = [
        f for f in frames if f["filename"].endswith(".py") and "/torch/_ops" not in f["filename"]
    ]
    model = next((f for f in python if "/transformers/" in f["filename"]), None)
    parts = [
        python_frame(f)
        for f in ([python[0]] if python else [])
        + ([model] if model and model is not python[0] else [])
    ]
    found: dict[str, list[str]] = {"node": [], "op": [], "native": [], "via": []}
    for frame in frames:
        if not frame["filename"].endswith(".py"):
            for tag, name in told(frame["name"]):
                found[tag].append(name)
    for tag, names in found.items():
        if unique := list(dict.fromkeys(names)):
            parts.append(f"{tag}={'<'.join(unique[:5])}")
    return " | ".join(parts)


def record(
    case: Case, expandable: bool, stacks: str, context: str | None, tiny: bool
) -> tuple[dict[str, Any], list[Any]]:
    """Run three steps under the recorder: the header and the merged lines."""
    clean()
    marks: list[dict[str, Any]] = []

    def mark(name: str) -> None:
        if CUDA:
            torch.cuda.synchronize()
        time.sleep(0.0005)
        marks.append({
            "mark": name, "t": time.time_ns() // 1000, "allocated": stat("memory_allocated"), "reserved": stat("memory_reserved"),
            "peak": stat("max_memory_allocated"), "peak_reserved": stat("max_memory_reserved")})  # fmt: skip
        time.sleep(0.0005)

    trace: list[dict[str, Any]] = []
    if CUDA:
        torch.cuda.memory._record_memory_history(
            "all", context=context, stacks=stacks, max_entries=400_000
        )
    try:
        mark("start")
        model = build(case, tiny)
        mark("model")
        step = Step(case, model, tiny)
        mark("optimizer built")
        for number in range(STEPS):
            step(lambda name, number=number: mark(f"{name} {number}"))
        if CUDA:
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
    finally:
        if CUDA:
            torch.cuda.memory._record_memory_history(None)
    table: dict[str, int] = {}
    seen: dict[int, int] = {}
    lines: list[Any] = []
    pending = list(marks)
    for event in trace:
        while pending and pending[0]["t"] <= event["time_us"]:
            lines.append(pending.pop(0) | {"events": len(lines)})
        frames = event.get("frames") or []
        number = seen.get(id(frames)) if frames else None
        if number is None:
            number = seen[id(frames)] = table.setdefault(label(frames), len(table))
        lines.append([event["action"], event["addr"], event["size"], number])
    lines += pending
    header = dataclasses.asdict(case) | {
        "steps": STEPS, "expandable": expandable, "stacks": stacks, "context": context, "torch": torch.__version__, "events": len(trace),
        "params": sum(p.numel() for p in model.parameters()),
        "tied": len({p.data_ptr() for p in model.parameters()}) < len(list(model.named_parameters(remove_duplicate=False))),
        "labels": list(table)}  # fmt: skip
    return header, lines


def main() -> None:
    """This worker's share of the cases, each to a file of its own."""
    folder, worker, workers, seconds = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    expandable, tiny = "--expandable" in sys.argv, "--tiny" in sys.argv
    match = sys.argv[sys.argv.index("--match") + 1] if "--match" in sys.argv else ""
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    for case in (EXPANDABLE if expandable else CASES)[worker::workers]:
        if time.time() - began > seconds:
            print("deadline: stopped before", case)
            break
        case = dataclasses.replace(case, layers=3)
        stacks = "all" if time.time() - began < 0.7 * seconds else "python"
        name = (f"{case.model}_T{case.seq}_mb{case.mb}_{case.prec}_ckpt{case.ckpt}_{case.attn}_accum{case.accum}_clip{case.clip:g}"
                f"{'_expandable' if expandable else ''}")  # fmt: skip
        if match and not re.search(match, name):
            continue
        start = time.time()
        try:
            # A recomputation that stops early unwinds past freed tensors; recording Python frames there loses the exception.
            try:
                header, lines = record(
                    case, expandable, stacks, "alloc" if case.ckpt else "all", tiny
                )
            except SystemError as error:
                print(name, error, "- again without stacks", flush=True)
                header, lines = record(case, expandable, stacks, None, tiny)
            with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
                for line in [header, *lines]:
                    file.write(json.dumps(line, separators=(",", ":")) + "\n")
            print(
                f"{name}: {header['events']} events, {len(header['labels'])} labels, {time.time() - start:.1f} s",
                flush=True,
            )
        except Exception:
            (folder / f"{name}.error.txt").write_text(traceback.format_exc())
            print(name, traceback.format_exc().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
