"""What the host pays: seconds to issue one operator, one backward node, one block, one optimizer call.

`python h200_dispatch.py OUT.csv [TABLE ...] [--tiny]`: tensors are tiny, nothing waits for the GPU inside a timed loop.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from h200_blocks import block_counts, block_rows, list_rows
from h200_timing import AMP, DEVICE, TINY, host, wait
from torch.nn.attention.varlen import varlen_attn

from sftplan.facts.strategy import Checkpointing
from sftplan.train.attention import _options
from sftplan.train.checkpointing import checkpointed


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tiny operands, all of them part of a graph."""
    made = {"x": torch.randn(1, 8, 64, device=DEVICE), "w": torch.randn(64, 64, device=DEVICE), "b": torch.zeros(64, device=DEVICE),
            "q": torch.randn(1, 2, 8, 32, device=DEVICE), "logits": torch.randn(8, 128, device=DEVICE), "table": torch.randn(128, 64, device=DEVICE)}  # fmt: skip
    return {k: v.to(dtype).requires_grad_() for k, v in made.items()}


def operators(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The operators a transformer's step is made of."""
    t = tensors(dtype)
    x, w, b, q, logits = (t[k] for k in ("x", "w", "b", "q", "logits"))
    flat = torch.randn(8, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    ids, target = (
        torch.randint(0, 128, (1, 8), device=DEVICE),
        torch.randint(0, 128, (8,), device=DEVICE),
    )
    return {
        "add": lambda: torch.add(x, x), "mul": lambda: torch.mul(x, x), "linear": lambda: F.linear(x, w),
        "linear+bias": lambda: F.linear(x, w, b), "addmm": lambda: torch.addmm(b, flat, w),
        "layer_norm": lambda: F.layer_norm(x, (64,), b, b), "rms_norm": lambda: F.rms_norm(x, (64,), b),
        "dropout": lambda: F.dropout(x, 0.1), "gelu": lambda: F.gelu(x), "gelu tanh": lambda: F.gelu(x, approximate="tanh"),
        "silu": lambda: F.silu(x), "sdpa": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        "sdpa dropout": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1),
        "embedding": lambda: F.embedding(ids, t["table"]), "cross_entropy": lambda: F.cross_entropy(logits, target),
        "view": lambda: x.view(8, 64), "transpose": lambda: x.transpose(1, 2), "split": lambda: x.split(32, dim=2),
        "contiguous copy": lambda: x.transpose(1, 2).contiguous(), "to other dtype": lambda: x.to(torch.float16),
        "pow": lambda: x.pow(2), "mean": lambda: x.mean(-1, keepdim=True), "rsqrt": lambda: x.rsqrt(), "cat": lambda: torch.cat((x, x), -1),
        "neg": lambda: -x, "slice": lambda: x[..., :32], "empty": lambda: torch.empty(8, 64, device=DEVICE),
        "softmax": lambda: F.softmax(logits, -1), "matmul 4d": lambda: torch.matmul(q, q.transpose(2, 3)),
    }  # fmt: skip


def op_rows() -> Iterator[tuple[str, str, float]]:
    """Forward operators: eager, and under autocast in one context."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for op, run in operators(dtype).items():
            if not (name == "fp32" and op.startswith("sdpa")):
                yield f"forward {name}", op, host(run)
    with torch.autocast(**AMP):
        for op, run in operators(torch.float32).items():
            yield "forward autocast, weight cast cached", op, host(run)
    t = tensors(torch.float32)
    half = torch.randn(1, 8, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def recast(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(**AMP):
                return function()

        return run

    yield "autocast", "enter and leave", host(recast(lambda: None))
    yield (
        "autocast",
        "enter, linear with weight cast, leave",
        host(recast(lambda: F.linear(half, t["w"]))),
    )
    yield (
        "autocast",
        "enter, linear with weight and bias cast, leave",
        host(recast(lambda: F.linear(half, t["w"], t["b"]))),
    )
    with torch.no_grad():
        yield "no_grad fp32", "add", host(operators(torch.float32)["add"])
        yield "no_grad fp32", "linear", host(operators(torch.float32)["linear"])
    empty = torch.nn.Identity()
    linear = torch.nn.Linear(64, 64, device=DEVICE)
    x = t["x"]
    yield "module", "Identity call", host(lambda: empty(x))
    yield "module", "Linear call", host(lambda: linear(x))


def backward_rows() -> Iterator[tuple[str, str, float]]:
    """Backward per node: a chain of one operator, differentiated, divided by its length."""
    length = 5 if TINY else 100
    for name, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("autocast", torch.float32),
    ):
        t = tensors(dtype)
        b, w = t["b"], t["w"]
        t["rows"] = torch.randn(8, 2, 32, device=DEVICE, dtype=dtype).requires_grad_()
        ends = torch.tensor([0, 8], device=DEVICE, dtype=torch.int32)
        gains = [
            torch.ones(64, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(length)
        ]
        weights = [
            torch.randn(64, 64, device=DEVICE).mul(0.1).to(dtype).requires_grad_()
            for _ in range(length)
        ]
        chains: dict[str, tuple[str, Callable[[torch.Tensor, int], torch.Tensor]]] = {
            "add": ("x", lambda h, i: h + 1.0), "add two inputs": ("x", lambda h, i: h + h), "mul": ("x", lambda h, i: h * gains[i]),
            "linear": ("x", lambda h, i: F.linear(h, weights[i])), "linear one weight": ("x", lambda h, i: F.linear(h, w)),
            "linear+bias": ("x", lambda h, i: F.linear(h, weights[i], gains[i])),
            "layer_norm": ("x", lambda h, i: F.layer_norm(h, (64,), gains[i], b)), "rms_norm": ("x", lambda h, i: F.rms_norm(h, (64,), gains[i])),
            "gelu tanh": ("x", lambda h, i: F.gelu(h, approximate="tanh")), "silu": ("x", lambda h, i: F.silu(h)), "dropout": ("x", lambda h, i: F.dropout(h, 0.1)),
            "view": ("x", lambda h, i: h.view(8, 64).view(1, 8, 64)), "transpose": ("x", lambda h, i: h.transpose(1, 2).transpose(1, 2)),
            "sdpa": ("q", lambda h, i: F.scaled_dot_product_attention(h, h, h, is_causal=True)),
            "varlen": ("rows", lambda h, i: varlen_attn(h, h, h, ends, ends, 8, 8, **_options(None, None))),
        }  # fmt: skip
        for op, (source, link) in chains.items():
            if (name == "fp32" and op == "sdpa") or (op == "varlen" and name != "bf16"):
                continue
            readings, forward = [], []
            for _ in range(3 if TINY else 20):
                for p in (*t.values(), *gains, *weights):
                    p.grad = None
                wait()
                start = time.perf_counter()
                with torch.autocast(**AMP, enabled=name == "autocast"):
                    h = t[source]
                    for i in range(length):
                        h = link(h, i)
                middle = time.perf_counter()
                up = torch.ones_like(h)
                wait()
                began = time.perf_counter()
                h.backward(up)
                readings.append((time.perf_counter() - began) / length)
                forward.append((middle - start) / length)
            yield f"backward per link {name}", op, statistics.median(readings)
            yield f"forward per link {name}", op, statistics.median(forward)


def checkpoint_rows() -> Iterator[tuple[str, str, float]]:
    """A checkpointed call: seconds of its own, and of each operation in it, forward and backward.

    Chains of a few and of many operations of a kind that a selective policy computes again, or keeps
    ("linear"): the slope is an operation, the rest the call.
    """
    few, many, repeats = (2, 4, 3) if TINY else (10, 50, 30)
    for what in ("add", "linear"):
        x = torch.randn(8, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16).mul(0.1).requires_grad_()
        for kind in Checkpointing:
            found: dict[str, list[float]] = {}
            for length in (few, many):

                def chain(
                    h: torch.Tensor, what: str = what, n: int = length, w: torch.Tensor = w
                ) -> torch.Tensor:
                    for _ in range(n):
                        h = h + 1.0 if what == "add" else F.linear(h, w)
                    return h

                run, readings = checkpointed(chain, kind), []
                for _ in range(repeats):
                    wait()
                    start = time.perf_counter()
                    h = run(x)
                    middle = time.perf_counter()
                    up = torch.ones_like(h)
                    wait()
                    began = time.perf_counter()
                    h.backward(up)
                    readings.append((middle - start, time.perf_counter() - began))
                for phase, values in zip(
                    ("forward", "backward"), zip(*readings, strict=True), strict=True
                ):
                    found.setdefault(phase, []).append(statistics.median(values))
            for phase, (less, more) in found.items():
                slope = (more - less) / (many - few)
                yield f"{phase} {kind} checkpointing, an operation", what, slope
                yield f"{phase} {kind} checkpointing, a call", what, less - few * slope


def main() -> None:
    """Every table to one file."""
    start = time.time()
    with Path(sys.argv[1]).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "what", "seconds_or_count"])
        every = (op_rows, backward_rows, checkpoint_rows, block_rows, list_rows, block_counts)
        for table in [t for t in every if t.__name__ in sys.argv] or every:
            try:
                for row in table():
                    writer.writerow(row)
                    file.flush()
            except Exception:
                traceback.print_exc()
            print(f"{table.__name__} done at {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
