"""Host seconds per layer in a running step: models so narrow that the GPU never holds the host up.

`python h200_host.py OUT.csv` times the plain loop's phases at 4 and at 16 layers; the slope is one layer, the rest the model's ends.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h200_loop
import torch
import transformers
from h200_loop import DEVICE, SHAPES, Case, Step, clean

FAMILIES = (
    "gpt2",
    "tinyllama-1.1b",
    "qwen3-0.6b",
    "pythia-410m",
    "opt-125m",
    "phi-2",
    "gemma-3-1b",
)
SMALL = {"n_embd": 256, "n_head": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
         "ffn_dim": 1024, "word_embed_proj_dim": 256, "head_dim": 64, "vocab_size": 2048}  # fmt: skip
FEW, MANY = 4, 16
WARM, STEPS = 4, 12


def build(case: Case) -> Any:
    """The narrow model of a case's family."""
    cls, kwargs = SHAPES[case.model]
    kwargs = dict(kwargs) | {k: v for k, v in SMALL.items() if k in kwargs}
    kwargs["n_layer" if "n_layer" in kwargs else "num_hidden_layers"] = case.layers
    config = getattr(transformers, cls)(**kwargs)
    config.use_cache = False
    dtype = torch.bfloat16 if case.prec == "bf16" else torch.float32
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=case.attn
        )
    if case.ckpt:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def phases(case: Case) -> dict[str, float]:
    """Median seconds of each phase on the host; `step` until the GPU is done."""
    model = build(case)
    step = Step(case, model)
    seen: dict[str, list[float]] = {}
    for number in range(WARM + STEPS):
        torch.cuda.synchronize()
        start = last = time.perf_counter()

        def mark(name: str, number: int = number) -> None:
            nonlocal last
            now = time.perf_counter()
            if number >= WARM:
                seen.setdefault(name, []).append(now - last)
            last = now

        step(mark)
        torch.cuda.synchronize()
        if number >= WARM:
            seen.setdefault("step", []).append(time.perf_counter() - start)
    del model, step
    clean()
    return {name: statistics.median(values) for name, values in seen.items()}


def rows() -> Iterator[dict[str, Any]]:
    """One row per family, precision, checkpointing and phase."""
    for family in FAMILIES:
        for prec in (
            ("bf16", "amp", "fp32", "fp16amp") if family in FAMILIES[:2] else ("bf16", "amp")
        ):
            for ckpt in (0, 1) if prec in ("bf16", "amp") else (0,):
                few, many = (phases(Case(family, 64, 1, prec, ckpt, layers=n)) for n in (FEW, MANY))
                for name in many:
                    slope = (many[name] - few[name]) / (MANY - FEW)
                    yield {"model": family, "prec": prec, "ckpt": ckpt, "phase": name,
                           "per_layer_s": slope, "ends_s": few[name] - FEW * slope}  # fmt: skip


def main() -> None:
    """Write the table."""
    start = time.perf_counter()
    with Path(sys.argv[1]).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "prec", "ckpt", "phase", "per_layer_s", "ends_s"])
        writer.writeheader()
        for row in rows():
            writer.writerow(row)
            file.flush()
    print(f"{time.perf_counter() - start:.1f} s", h200_loop.CUDA, torch.__version__)


if __name__ == "__main__":
    main()
