"""Times of kernels that move bytes: elementwise, norms, loss, embedding, the optimizer's lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from h200_timing import DEVICE, DTYPES, TINY, both, sets_for, timed


def membound() -> Iterator[dict[str, Any]]:
    """Operators that move bytes; `bytes` counts each input read and each output written once."""
    sizes = [1 << 16] if TINY else [1 << s for s in range(16, 31, 2)]
    for size, name in product(sizes, ("bf16", "fp32")):
        dtype, width = DTYPES[name], DTYPES[name].itemsize
        count, columns = size // width, 64 if TINY else 1024
        rows, other = count // columns, torch.float32 if name == "bf16" else torch.bfloat16
        sets = sets_for(3 * size)
        x, y, z = (
            [torch.randn(rows, columns, device=DEVICE).to(dtype) for _ in range(sets)]
            for _ in range(3)
        )
        weight, bias = (
            torch.ones(columns, dtype=dtype, device=DEVICE),
            torch.zeros(columns, dtype=dtype, device=DEVICE),
        )
        cast = [torch.empty(rows, columns, dtype=other, device=DEVICE) for _ in range(sets)]
        small = torch.empty(columns, dtype=dtype, device=DEVICE)
        plain: dict[str, tuple[float, Callable[[int], Any]]] = {
            "add": (3 * size, lambda i: torch.add(x[i % sets], y[i % sets], out=z[i % sets])),
            "mul": (3 * size, lambda i: torch.mul(x[i % sets], y[i % sets], out=z[i % sets])),
            "cast": (size + count * other.itemsize, lambda i: cast[i % sets].copy_(x[i % sets])),
            "copy": (2 * size, lambda i: z[i % sets].copy_(x[i % sets])),
            "zero_": (size, lambda i: z[i % sets].zero_()),
            "sum rows": (size, lambda i: torch.sum(x[i % sets], 0, out=small)),
            "norm": (size, lambda i: torch._foreach_norm([x[i % sets]])),
        }
        for kernel, (moved, run) in plain.items():
            seconds, n = timed(run)
            yield {
                "kernel": kernel,
                "dtype": name,
                "form": "",
                "elements": count,
                "bytes": moved,
                "seconds": seconds,
                "repeats": n,
                "gbps": moved / seconds / 1e9,
            }
        graphs: dict[str, tuple[float, float, Callable[..., Any], list[list[torch.Tensor]]]] = {
            "gelu tanh": (
                2 * size,
                3 * size,
                lambda a: F.gelu(a, approximate="tanh"),
                [[t] for t in x],
            ),
            "silu": (2 * size, 3 * size, F.silu, [[t] for t in x]),
            "dropout": (
                2 * size + count,
                2 * size + count,
                lambda a: torch.native_dropout(a, 0.1, True)[0],
                [[t] for t in x],
            ),
            "layer_norm": (
                2 * size,
                3 * size,
                lambda a, w, b: F.layer_norm(a, (columns,), w, b),
                [[t, weight, bias] for t in x],
            ),
            "rms_norm": (
                2 * size,
                3 * size,
                lambda a, w: F.rms_norm(a, (columns,), w),
                [[t, weight] for t in x],
            ),
        }
        for kernel, (moved_f, moved_b, function, tensors) in graphs.items():
            for form, seconds, n in both(function, tensors):
                moved = moved_f if form == "forward" else moved_b
                yield {
                    "kernel": kernel,
                    "dtype": name,
                    "form": form,
                    "elements": count,
                    "bytes": moved,
                    "seconds": seconds,
                    "repeats": n,
                    "gbps": moved / seconds / 1e9,
                }
    yield from losses()
    yield from lists()


def losses() -> Iterator[dict[str, Any]]:
    """Cross-entropy in fp32 over GPT-2's vocabulary; the embedding and its dense gradient."""
    vocab, d = (500, 64) if TINY else (50257, 1280)
    for tokens in (64,) if TINY else (512, 1024, 2048, 4096, 8192):
        size = tokens * vocab * 4
        target = [torch.randint(0, vocab, (tokens,), device=DEVICE) for _ in range(2)]
        logits = [[torch.randn(tokens, vocab, device=DEVICE), t] for t in target]
        for form, seconds, n in both(lambda a, t: F.cross_entropy(a, t), logits):
            moved = 3 * size
            yield {
                "kernel": f"cross_entropy V={vocab}",
                "dtype": "fp32",
                "form": form,
                "elements": tokens * vocab,
                "bytes": moved,
                "seconds": seconds,
                "repeats": n,
                "gbps": moved / seconds / 1e9,
            }
        for name in ("bf16", "fp32"):
            table = torch.randn(vocab, d, device=DEVICE).to(DTYPES[name])
            for form, seconds, n in both(
                lambda ids, w: F.embedding(ids, w), [[t, table] for t in target]
            ):
                moved = (
                    2 * tokens * d * table.itemsize
                    if form == "forward"
                    else (vocab + 2 * tokens) * d * table.itemsize
                )
                yield {
                    "kernel": f"embedding {vocab}x{d}",
                    "dtype": name,
                    "form": form,
                    "elements": tokens * d,
                    "bytes": moved,
                    "seconds": seconds,
                    "repeats": n,
                    "gbps": moved / seconds / 1e9,
                }


def lists() -> Iterator[dict[str, Any]]:
    """Fused AdamW and the clipping norm over gpt2-large's list of parameters."""
    d = 64 if TINY else 1280
    layer = [
        (d,),
        (d,),
        (d, 3 * d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (d, 4 * d),
        (4 * d,),
        (4 * d, d),
        (d,),
    ]
    shapes = [
        (50257 if not TINY else 500, d),
        (1024, d),
        *(layer * (2 if TINY else 36)),
        (d,),
        (d,),
    ]
    for name in ("bf16", "fp32"):
        parameters = [
            torch.randn(*s, device=DEVICE).to(DTYPES[name]).requires_grad_() for s in shapes
        ]
        for p in parameters:
            p.grad = torch.randn_like(p)
        count, width = sum(p.numel() for p in parameters), parameters[0].itemsize
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        jobs: list[tuple[str, float, Callable[[int], Any]]] = [
            ("adamw fused", 7 * count * width, lambda i, o=optimizer: o.step()),
            ("foreach_norm", count * width, lambda i, ps=parameters: torch._foreach_norm([p.grad for p in ps])),
            ("clip_grad_norm_", 3 * count * width, lambda i, ps=parameters: torch.nn.utils.clip_grad_norm_(ps, 1.0)),
        ]  # fmt: skip
        for kernel, moved, run in jobs:
            seconds, n = timed(run, budget=0.2, most=10)
            yield {
                "kernel": kernel,
                "dtype": name,
                "form": f"{len(shapes)} tensors",
                "elements": count,
                "bytes": moved,
                "seconds": seconds,
                "repeats": n,
                "gbps": moved / seconds / 1e9,
            }
