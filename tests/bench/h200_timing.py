"""How the tables are timed: kernels by CUDA events over rotating tensors, the host by its own clock."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from h200_loop import CUDA, DEVICE

TINY = "--tiny" in sys.argv
CACHE = 4 << 20 if TINY else 256 << 20  # inputs and outputs rotate over at least this many bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AMP = {"device_type": DEVICE, "dtype": torch.bfloat16}
REPEATS = 20 if TINY else 2000


def timed(
    run: Callable[[int], Any], budget: float = 0.012, most: int = 30, least: int = 3
) -> tuple[float, int]:
    """Median seconds of `run(i)` over warmed repeats; i lets it rotate its tensors."""
    if not CUDA:
        start = time.perf_counter()
        run(0)
        return time.perf_counter() - start, 1
    run(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(1)
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    repeats = max(least, min(most, int(budget / once)))
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    torch.cuda._sleep(
        int(min(once * repeats, 0.004) * 1.9e9)
    )  # cycles: lets the host run ahead, so that launches queue and the gaps are not the host's
    for number, (before, after) in enumerate(marks):
        before.record()
        run(number)
        after.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks) / 1e3, repeats


class Pool:
    """Random numbers to cut tensors from, each time at another place."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self.data = torch.empty(elements, dtype=dtype, device=DEVICE).normal_()

    def cut(self, *shape: int, number: int) -> torch.Tensor:
        """A view of the shape; the number chooses where it starts."""
        size = 1
        for n in shape:
            size *= n
        places = max(1, self.data.numel() // size)
        start = (number % places) * size
        return self.data[start : start + size].view(*shape)


def both(
    function: Callable[..., Any], tensors: list[list[torch.Tensor]]
) -> Iterator[tuple[str, float, int]]:
    """Forward, and backward through kept graphs, of a function over rotating sets of inputs."""
    sets = len(tensors)
    with torch.no_grad():
        yield "forward", *timed(lambda i: function(*tensors[i % sets]))
    wanted = [[t.detach().requires_grad_(t.is_floating_point()) for t in row] for row in tensors]
    outs = [function(*row) for row in wanted]
    ups = [torch.randn_like(out) if out.dim() else None for out in outs]

    def backward(i: int) -> Any:
        leaves = [t for t in wanted[i % sets] if t.requires_grad]
        return torch.autograd.grad(outs[i % sets], leaves, ups[i % sets], retain_graph=True)

    yield "backward", *timed(backward)


def sets_for(size: int) -> int:
    """How many input sets of so many bytes to rotate."""
    return max(1, min(6, CACHE // max(size, 1)))


def wait() -> None:
    """Drain the GPU's queue."""
    if CUDA:
        torch.cuda.synchronize()


def host(run: Callable[[], Any], repeats: int = REPEATS, chunk: int = 100) -> float:
    """Median over chunks of the host's seconds per call; the queue is drained between chunks, outside the clock."""
    for _ in range(3):
        run()
    readings = []
    for _ in range(max(1, repeats // chunk)):
        wait()
        start = time.perf_counter()
        for _ in range(chunk):
            run()
        readings.append((time.perf_counter() - start) / chunk)
    wait()
    return statistics.median(readings)
