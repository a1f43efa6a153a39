"""Kernel and operator tables of whole steps, what the CUDA context costs, how fast copies are.

`python h200_profile.py FOLDER [phases] [--tiny]` writes FOLDER/phases_*.csv, profile_*.csv and context.json.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import torch
from h200_loop import CUDA, DEVICE, Case, Step, build, clean, nvml_used, stat
from h200_timing import timed

TINY = "--tiny" in sys.argv
CASES = [Case("gpt2-large", 1024, 8, "amp"), Case("tinyllama-1.1b", 1024, 4, "bf16"), Case("gpt2-large", 1024, 1, "amp"),
         Case("gpt2-large", 1024, 1, "bf16", 1), Case("qwen2.5-0.5b", 1024, 2, "amp")]  # fmt: skip


def smi() -> str:
    """What nvidia-smi says of the device."""
    try:
        query = "--query-gpu=name,driver_version,memory.used,memory.total,clocks.sm,clocks.mem"
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:
        return ""


def context() -> dict[str, Any]:
    """Device memory around the first uses of CUDA; bandwidth of copies."""
    facts: dict[str, Any] = {"smi before CUDA": smi(), "nvml before CUDA": nvml_used()}
    torch.zeros(1, device=DEVICE)
    facts |= {
        "nvml after CUDA starts": nvml_used(),
        "reserved after CUDA starts": stat("memory_reserved"),
    }
    a = torch.randn(256, 256, device=DEVICE)
    for name, b in (("fp32", a), ("bf16", a.bfloat16())):
        b @ b
        facts[f"nvml after a {name} product"], facts[f"reserved after a {name} product"] = (
            nvml_used(),
            stat("memory_reserved"),
        )
    case = Case("gpt2-large", 1024, 1, "amp", layers=3)
    model = build(case, TINY)
    step = Step(case, model, TINY)
    for number in range(3):
        step()
        facts |= {
            f"nvml after step {number}": nvml_used(),
            f"reserved after step {number}": stat("memory_reserved"),
        }
    facts["smi after steps"] = smi()
    del model, step
    clean()
    facts |= {"nvml after clean": nvml_used(), "reserved after clean": stat("memory_reserved")}
    for size in (1 << 20, 1 << 24, 1 << 28, 1 << 30):
        if not CUDA:
            break
        host, other = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True),
            torch.empty(size, dtype=torch.uint8),
        )
        one, two = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        for what, run in (("H2D pinned", lambda: one.copy_(host, non_blocking=True)), ("D2H pinned", lambda: host.copy_(one, non_blocking=True)),
                          ("H2D pageable", lambda: one.copy_(other)), ("D2D", lambda: two.copy_(one))):  # fmt: skip
            seconds, _ = timed(lambda _, r=run: r(), budget=0.1, most=20)
            facts[f"{what} {size} bytes: GB/s (payload)"] = round(size / seconds / 1e9, 2)
    return facts


def phases(case: Case) -> dict[str, float]:
    """Seconds of a steady step's phases: as it runs, then waiting for the GPU at each border."""
    clean()
    model = build(case, TINY)
    step = Step(case, model, TINY)
    for _ in range(3):
        step()
    clocks: list[dict[str, float]] = []
    for waits, _ in product((False, True), range(4)):
        found: dict[str, float] = {}
        if CUDA:
            torch.cuda.synchronize()
        last = start = time.perf_counter()

        def mark(name: str, found: dict[str, float] = found, waits: bool = waits) -> None:
            nonlocal last
            if waits and CUDA:
                torch.cuda.synchronize()
            now = time.perf_counter()
            found[f"{'until GPU done' if waits else 'host'} {name}"] = now - last
            last = now

        step(mark)
        if CUDA:
            torch.cuda.synchronize()
        found["step, waiting at borders" if waits else "step"] = time.perf_counter() - start
        clocks.append(found)
    names = list(dict.fromkeys(k for c in clocks for k in c))
    return {k: statistics.median(c[k] for c in clocks if k in c) for k in names}


def profiled(case: Case) -> list[tuple[Any, ...]]:
    """One steady step under the profiler: kernels and operators by time."""
    clean()
    model = build(case, TINY)
    step = Step(case, model, TINY)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profile:
        step()
        if CUDA:
            torch.cuda.synchronize()
    rows = [
        ("kernel" if "CUDA" in str(e.device_type) else "operator", e.key[:200], e.count, round(e.self_device_time_total, 1),
         round(e.self_cpu_time_total, 1), round(e.cpu_time_total, 1))
        for e in profile.key_averages()
        if not ("CUDA" in str(e.device_type) and e.key.startswith("Optimizer."))  # a range, not a kernel
    ]  # fmt: skip
    return sorted(rows, key=lambda r: (r[0], -(r[3] if r[0] == "kernel" else r[4])))


def main() -> None:
    """Context, phases, tables: in this order, because a profiler slows whatever runs after it."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, header: list[str], rows: Any) -> None:
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    try:
        (folder / "context.json").write_text(json.dumps(context(), indent=1))
    except Exception:
        traceback.print_exc()
    for what, case in product((phases,) if "phases" in sys.argv else (phases, profiled), CASES):
        name = f"{case.model}_mb{case.mb}_{case.prec}_ckpt{case.ckpt}.csv"
        try:
            found = what(case)
            if isinstance(found, dict):
                write(f"phases_{name}", ["phase", "seconds"], found.items())
                print(name, {k: round(v, 5) for k, v in found.items()}, flush=True)
            else:
                columns = ["kind", "name", "count", "self_cuda_us", "self_cpu_us", "cpu_total_us"]
                write(f"profile_{name}", columns, found)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
