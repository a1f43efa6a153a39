"""Times of single GPU kernels for a roofline: products, attention, memory-bound operators, copies.

`python h200_kernels.py FOLDER [TABLE ...] [--tiny]` writes FOLDER/matmul.csv, attention.csv, membound.csv (median seconds by CUDA events).
"""

from __future__ import annotations

import csv
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from h200_membound import membound
from h200_timing import CACHE, CUDA, DEVICE, DTYPES, TINY, Pool, both, sets_for, timed

ROWS = (16, 32) if TINY else (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WEIGHTS = [(64, 96)] if TINY else [
    (768, 2304), (768, 3072), (1024, 4096), (1280, 1280), (1280, 3840), (1280, 5120), (5120, 1280), (2048, 2048), (2048, 5632),
    (4096, 4096), (4096, 14336), (896, 4864), (1280, 50257), (1280, 50304), (2048, 32000), (896, 151936)]  # fmt: skip


def matmul() -> Iterator[dict[str, Any]]:
    """y = x @ w^T, dx = dy @ w, dw = dy^T @ x, and GPT-2's own addmm over a (k, n) weight."""
    for name, dtype in DTYPES.items():
        rows = [m for m in ROWS if name != "fp32" or m <= 8192]
        most = max(
            *(max(m * n, m * k, n * k) for (k, n), m in product(WEIGHTS, rows)),
            CACHE // dtype.itemsize,
        )
        inputs, outputs = Pool(dtype, most), Pool(dtype, most)
        for (k, n), m in product(WEIGHTS, rows):
            forms: dict[str, tuple[tuple[int, ...], Callable[[int], Any]]] = {}

            def make(
                rows: int, inner: int, columns: int, ta: bool, tb: bool
            ) -> Callable[[int], Any]:
                def run(i: int) -> Any:
                    a = inputs.cut(*((inner, rows) if ta else (rows, inner)), number=2 * i)
                    b = inputs.cut(
                        *((columns, inner) if tb else (inner, columns)), number=2 * i + 1
                    )
                    out = outputs.cut(rows, columns, number=i)
                    return torch.mm(a.t() if ta else a, b.t() if tb else b, out=out)

                return run

            forms["forward"] = make(m, k, n, False, True)
            forms["dx"] = make(m, n, k, False, False)
            forms["dw"] = make(n, m, k, True, False)
            if k in (768, 1280, 5120, 64) and n < 6000:

                def conv1d(i: int, m: int = m, k: int = k, n: int = n) -> Any:
                    bias = inputs.cut(n, number=i)
                    return torch.addmm(
                        bias,
                        inputs.cut(m, k, number=2 * i),
                        inputs.cut(k, n, number=2 * i + 1),
                        out=outputs.cut(m, n, number=i),
                    )

                forms["addmm"] = conv1d
            for form, run in forms.items():
                seconds, repeats = timed(run)
                yield {
                    "dtype": name,
                    "form": form,
                    "m": m,
                    "n": n,
                    "k": k,
                    "seconds": seconds,
                    "repeats": repeats,
                    "tflops": 2 * m * n * k / seconds / 1e12,
                }


def attention() -> Iterator[dict[str, Any]]:
    """Flash over batches, the masked memory-efficient kernel, and packed documents."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    grid = (
        product((2,), (32,), (16,), (0.0,))
        if TINY
        else product(
            (16, 20, 64, 160, 320), (256, 512, 1024, 2048, 4096), (64, 80, 128), (0.0, 0.1)
        )
    )
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for (heads, t, d, drop), kernel in product(grid, backends):
        tensors = [
            [
                torch.randn(1, t, heads, d, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
                for _ in range(3)
            ]
            for _ in range(sets_for(heads * t * d * 8))
        ]
        with sdpa_kernel(backends[kernel] if CUDA else SDPBackend.FLASH_ATTENTION):
            for form, seconds, n in both(
                lambda q, k, v, p=drop: F.scaled_dot_product_attention(
                    q, k, v, dropout_p=p, is_causal=True
                ),
                tensors,
            ):
                flops = 2 * t * t * heads * d * (1 if form == "forward" else 2.5)
                yield {
                    "kernel": kernel,
                    "form": form,
                    "heads": heads,
                    "t": t,
                    "d": d,
                    "dropout": drop,
                    "seconds": seconds,
                    "repeats": n,
                    "tflops": flops / seconds / 1e12,
                }
    for (heads, kv, t, d), kernel in product(
        []
        if TINY
        else [(64, 8, 1024, 64), (64, 16, 2048, 64), (128, 32, 1024, 64), (64, 16, 1024, 128)],
        backends,
    ):
        tensors = [
            [
                torch.randn(1, t, h, d, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
                for h in (heads, kv, kv)
            ]
            for _ in range(4)
        ]
        with sdpa_kernel(backends[kernel]):
            for form, seconds, n in both(
                lambda q, k, v: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                tensors,
            ):
                yield {
                    "kernel": f"{kernel}, {kv} key heads",
                    "form": form,
                    "heads": heads,
                    "t": t,
                    "d": d,
                    "dropout": 0.0,
                    "seconds": seconds,
                    "repeats": n,
                }
    for heads, t, d, drop in (
        [(2, 32, 16, 0.1)]
        if TINY
        else [(20, 1024, 64, 0.0), (160, 1024, 64, 0.0), (160, 1024, 64, 0.1), (64, 1024, 128, 0.0)]
    ):
        mask = torch.ones(t, t, dtype=torch.bool, device=DEVICE).tril()
        tensors = [
            [torch.randn(1, heads, t, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
            for _ in range(4)
        ]
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if CUDA else SDPBackend.MATH):
            for form, seconds, n in both(
                lambda q, k, v, p=drop, m=mask: F.scaled_dot_product_attention(
                    q, k, v, attn_mask=m, dropout_p=p
                ),
                tensors,
            ):
                yield {
                    "kernel": "efficient+bool mask",
                    "form": form,
                    "heads": heads,
                    "t": t,
                    "d": d,
                    "dropout": drop,
                    "seconds": seconds,
                    "repeats": n,
                }
    for heads, t, d in [] if TINY else [(160, 1024, 64), (64, 1024, 128)]:
        mask = torch.ones(t, t, dtype=torch.bool, device=DEVICE).tril()
        tensors = [
            [torch.randn(1, heads, t, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
            for _ in range(4)
        ]
        for form, seconds, n in both(
            lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m), tensors
        ):
            yield {
                "kernel": "default+bool mask",
                "form": form,
                "heads": heads,
                "t": t,
                "d": d,
                "dropout": 0.0,
                "seconds": seconds,
                "repeats": n,
            }
    for heads, t, d in [] if TINY else [(20, 1024, 64), (160, 1024, 64), (64, 1024, 128)]:
        tensors = [[torch.randn(1, heads, t, d, device=DEVICE) for _ in range(3)] for _ in range(4)]
        for form, seconds, n in both(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), tensors
        ):
            yield {
                "kernel": "fp32 default",
                "form": form,
                "heads": heads,
                "t": t,
                "d": d,
                "dropout": 0.0,
                "seconds": seconds,
                "repeats": n,
            }
    causal = (
        {"is_causal": True}
        if "is_causal" in inspect.signature(varlen_attn).parameters
        else {"window_size": (-1, 0)}
    )
    for tokens, document in [(64, 16)] if TINY else product((8192, 32768), (128, 1024)):
        ends = torch.arange(0, tokens + 1, document, dtype=torch.int32, device=DEVICE)
        tensors = [
            [torch.randn(tokens, 20, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
            for _ in range(3)
        ]
        for form, seconds, n in both(
            lambda q, k, v, e=ends, s=document: varlen_attn(q, k, v, e, e, s, s, **causal), tensors
        ):
            yield {
                "kernel": "varlen",
                "form": form,
                "heads": 20,
                "t": tokens,
                "d": 64,
                "dropout": 0.0,
                "document": document,
                "seconds": seconds,
                "repeats": n,
            }


def main() -> None:
    """Run each table; a failure ends its table, not the others."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tables = {table.__name__: table for table in (membound, attention, matmul)}
    for table in [tables[name] for name in sys.argv if name in tables] or tables.values():
        start, rows = time.time(), 0
        with (folder / f"{table.__name__}.csv").open("w", newline="") as file:
            writer = None
            try:
                for row in table():
                    if writer is None:
                        writer = csv.DictWriter(
                            file, [*row, "document", "note"], extrasaction="ignore"
                        )
                        writer.writeheader()
                    writer.writerow(row)
                    rows += 1
                    if rows % 50 == 0:
                        file.flush()
            except Exception:
                traceback.print_exc()
        if CUDA:
            torch.cuda.empty_cache()
        print(f"{table.__name__}: {rows} rows, {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
