"""What this GPU and its host reach: products, streaming, copies, AdamW on the host.

Each figure is defined as the rate of the profiles that it replaces. On a processor the same kernels
run in small, which tests the code and measures nothing of use.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it

from sftplan.cost.comm import CPU_ADAM_BYTES_PER_PARAMETER
from sftplan.facts.calibration import Product

if TYPE_CHECKING:
    from collections.abc import Callable

# (m, n, k) of the layers of models of 0.1 to 8 billion parameters: few rows, then many.
PRODUCT_SIZES = (
    (1024, 2304, 768), (4096, 3840, 1280), (8192, 5120, 1280), (16384, 1280, 5120), (8192, 4096, 4096),
    (16384, 4096, 14336), (32768, 4096, 4096), (16384, 8192, 8192),
)  # fmt: skip
LARGE_FLOPS = 5e11  # what counts as a large product: start and end of its waves no longer matter
STREAM_BYTES = 2**30
COPY_BYTES = 2**28
ADAM_PARAMETERS = 2**26
REPEATS = 10
SMALL = 64  # of everything on a processor: a test of the code


def timed_s(run: Callable[[], Any], device: torch.device, *, repeats: int = REPEATS) -> float:
    """Median seconds of the device for one call, after two that warm up."""
    for _ in range(2):
        run()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
    return float(statistics.median(seconds))


def products(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[Product]:
    """Matrix products at the sizes of real layers."""
    found = []
    for dtype in dtypes:
        for m, n, k in PRODUCT_SIZES:
            if device.type != "cuda":
                m, n, k = m // SMALL, n // SMALL, k // SMALL
            a, b = (torch.randn(*s, device=device, dtype=dtype) for s in ((m, k), (n, k)))
            out = torch.empty(m, n, device=device, dtype=dtype)
            seconds = timed_s(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out), device)  # type: ignore[misc]
            rate = 2.0 * m * n * k / seconds
            name = str(dtype).removeprefix("torch.")
            found.append(Product(dtype=name, m=m, n=n, k=k, flops_per_s=rate))
    return found


def large_rate(found: list[Product], dtype: str) -> float:
    """What large products of a type reach, FLOP/s: their median."""
    alike = [p for p in found if p.dtype == dtype]
    large = [p.flops_per_s for p in alike if 2.0 * p.m * p.n * p.k >= LARGE_FLOPS]
    return statistics.median(large or [p.flops_per_s for p in alike])


def streaming_bytes_per_s(device: torch.device) -> float:
    """Adds, multiplications and copies of tensors far larger than any cache."""
    elements = STREAM_BYTES // 4 if device.type == "cuda" else STREAM_BYTES // 4 // SMALL
    a, b = (torch.randn(elements, device=device) for _ in range(2))
    out = torch.empty_like(a)
    runs: list[tuple[int, Callable[[], Any]]] = [
        (3, lambda: torch.add(a, b, out=out)),
        (3, lambda: torch.mul(a, b, out=out)),
        (2, lambda: out.copy_(a)),
    ]
    rates = [streams * a.nbytes / timed_s(run, device) for streams, run in runs]
    return statistics.median(rates)


def link_bytes_per_s(device: torch.device) -> float | None:
    """Pinned copies to the GPU and back: the slower direction. None without a GPU."""
    if device.type != "cuda":
        return None
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    up = timed_s(lambda: here.copy_(there, non_blocking=True), device)
    down = timed_s(lambda: there.copy_(here, non_blocking=True), device)
    return COPY_BYTES / max(up, down)


def host_bytes_per_s(*, small: bool) -> float:
    """Copies in the host's memory with all threads: read and written."""
    elements = STREAM_BYTES // 4 // (SMALL if small else 1)
    source, target = torch.ones(elements), torch.empty(elements)
    seconds = timed_s(lambda: target.copy_(source), torch.device("cpu"), repeats=5)
    return 2 * source.nbytes / seconds


def cpu_adam_bytes_per_s(*, small: bool) -> float:
    """AdamW on the host in fp32, fused, all threads, by the bytes that the plan counts."""
    count = ADAM_PARAMETERS // (SMALL if small else 1)
    weight = torch.nn.Parameter(torch.ones(count))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-5, fused=True)
    seconds = timed_s(optimizer.step, torch.device("cpu"), repeats=3)
    return CPU_ADAM_BYTES_PER_PARAMETER * count / seconds


def load_kernels(device: torch.device) -> None:
    """Run one small step of what training runs, so that the context holds its kernels."""
    layer = torch.nn.TransformerEncoderLayer(
        64, 4, 128, batch_first=True, device=device, dtype=torch.float32
    )
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(torch.randn(2, 64, 64, device=device))
    targets = torch.zeros(128, dtype=torch.long, device=device)
    F.cross_entropy(out.float().view(-1, 64), targets).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
