"""`python -m ranks_collectives DIR`: one rank that times collectives by size, and weighs NCCL on its GPU."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks_apart import SETTINGS

from sftplan.verify.child import end_with_parent
from sftplan.verify.request import result_file

WARMUPS, MOST_REPEATS, ENOUGH_S = 3, 40, 0.4  # of each size
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast")
ELEMENT_BYTES = 2  # bf16


def bus_bytes_per_s(kind: str, nbytes: int, ranks: int, seconds: float) -> float:
    """What passes over the slowest link, as nccl-tests counts it (doc/PERFORMANCE.md); `nbytes` is the whole.

    >>> round(bus_bytes_per_s("all_reduce", 100, 4, 1.0), 6), bus_bytes_per_s("all_gather", 100, 4, 1.0)
    (150.0, 75.0)
    """
    factors = {"all_reduce": 2 * (ranks - 1) / ranks, "reduce": 1.0, "broadcast": 1.0}
    return factors.get(kind, (ranks - 1) / ranks) * nbytes / seconds


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds by kind and size, and what the driver shows as taken after each new thing."""
    from sftplan.verify.occupancy import taken_bytes

    rank, cpu = int(os.environ["RANK"]), asked["cpu"]
    before = None if cpu else taken_bytes(rank)
    import torch
    from torch import distributed

    from sftplan.train.model import device_of

    device = device_of(cpu=cpu, local_rank=rank)
    memory: list[tuple[str, int]] = []

    def weigh(what: str) -> None:
        if before is not None:
            torch.cuda.synchronize()
            now = taken_bytes(rank)
            memory.append((what, (now or 0) - before - torch.cuda.memory_reserved()))

    one = torch.ones(1024, device=device, dtype=torch.bfloat16)
    weigh("context")
    distributed.init_process_group("gloo" if cpu else "nccl")
    distributed.all_reduce(one)
    weigh("first all_reduce, 2 KB")
    ranks = distributed.get_world_size()
    most = max(asked["sizes"]) // ELEMENT_BYTES
    whole = torch.zeros(most, device=device, dtype=torch.bfloat16)
    part = torch.zeros(-(-most // ranks), device=device, dtype=torch.bfloat16)
    for kind in KINDS:
        _call(kind, whole, part, most // ranks * ranks, None)()
        weigh(f"first {kind}, largest")
    for number in (2, 3):  # DeepSpeed makes groups of its own
        group = distributed.new_group(list(range(ranks)))
        distributed.all_reduce(one, group=group)
        weigh(f"communicator {number}, all_reduce")
        for kind in ("all_gather", "reduce_scatter"):
            _call(kind, whole, part, most // ranks * ranks, group)()
        weigh(f"communicator {number}, the others")
    rows = []
    for kind in KINDS:
        for nbytes in asked["sizes"]:
            count = nbytes // ELEMENT_BYTES // ranks * ranks
            seconds = _seconds(_call(kind, whole, part, count, None), device)
            rate = bus_bytes_per_s(kind, nbytes, ranks, seconds)
            rows.append({"collective": kind, "bytes": nbytes, "ranks": ranks, "seconds": seconds,
                         "bus_bytes_per_s": rate})  # fmt: skip
    weigh("end")
    found = {
        "rows": rows,
        "memory": memory,
        "device": "cpu" if cpu else torch.cuda.get_device_name(device),
    }
    found["nccl"] = None if cpu else str(torch.cuda.nccl.version())
    found["environment"] = {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
    distributed.barrier()
    return found


def _call(kind: str, whole: Any, part: Any, count: int, group: Any) -> Callable[[], object]:
    from torch import distributed

    ranks = distributed.get_world_size()
    all_of, mine = whole[:count], part[: count // ranks]
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: distributed.all_reduce(all_of, group=group),
        "all_gather": lambda: distributed.all_gather_into_tensor(all_of, mine, group=group),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(mine, all_of, group=group),
        "reduce": lambda: distributed.reduce(all_of, dst=0, group=group),
        "broadcast": lambda: distributed.broadcast(all_of, src=0, group=group),
    }
    return calls[kind]


def _seconds(call: Callable[[], object], device: Any) -> float:
    """The median of repeats; of all ranks the slowest."""
    import torch
    from torch import distributed

    start = time.perf_counter()
    for _ in range(WARMUPS):
        call()
    _settle(device)
    each = (time.perf_counter() - start) / WARMUPS
    agreed = torch.tensor([each], device=device)
    distributed.all_reduce(agreed, op=distributed.ReduceOp.MAX)
    repeats = max(5, min(MOST_REPEATS, int(ENOUGH_S / float(agreed))))
    times = [_once(call, device) for _ in range(repeats)]
    found = torch.tensor([statistics.median(times)], device=device, dtype=torch.float64)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return float(found)


def _once(call: Callable[[], object], device: Any) -> float:
    import torch
    from torch import distributed

    if device.type != "cuda":
        distributed.barrier()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    distributed.barrier(device_ids=[device.index])
    torch.cuda.synchronize()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 1e3


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def main(folder: Path) -> None:
    """Leave what was found in the folder."""
    end_with_parent()
    found = measure(json.loads((folder / SETTINGS).read_text()))
    result_file(folder, int(os.environ["RANK"])).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
