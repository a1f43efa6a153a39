"""ZeRO and offload on one GPU through DeepSpeed, predicted against measured: `python h200_shard.py OUT.csv [--seconds 560]`.

Each case is a dry run in a process of its own. Host memory is what the machine holds beyond what it held
before, sampled: a process's own peak leaves out pinned pages. --events DIR keeps the large blocks of one
step of each gpt2-large case, with the lines that took them. --judge prints the errors of OUT.csv by this version.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from verify_cases import Only, h200

from sftplan.cost.evaluate import Evaluator
from sftplan.facts.hardware import Host
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import Strategy
from sftplan.facts.workload import Workload
from sftplan.plan.build import plan_from_choice
from sftplan.plan.record import Plan
from sftplan.plan.request import read_pins
from sftplan.units import GIB
from sftplan.verify.fit import beside_host
from sftplan.verify.profile import measure_here

SAMPLE_S = 0.1
STEPS = 4
LONGEST_S = 110.0  # of a case, with its events: none is begun with less time left
LARGE_BYTES = 2**20
FRAMES = 6
HOST = Host(memory_bytes=128 * GIB, num_cpus=16)  # beside the H200 that was measured
COLUMNS = (
    "name",
    "model",
    "zero",
    "offload",
    "checkpointing",
    "micro_batch",
    "accumulation",
    "status",
)
QUANTITIES = ("allocated", "reserved", "used", "host", "step_s")
MEASURED = (*(f"{q}{end}" for q in QUANTITIES for end in ("", "_predicted")),
            "host_rss", "host_scale", "forward_s", "backward_s", "optimizer_s", "first_step_s", "phase_peak_bytes")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One sharded step."""

    model: str
    zero: int
    offload: str
    checkpointing: str
    micro_batch: int
    accumulation: int = 1

    @property
    def name(self) -> str:
        """All that it is."""
        return f"{self.model} zero-{self.zero} {self.offload} {self.checkpointing} {self.micro_batch}x{self.accumulation}"


SHARDINGS = ((2, "optimizer"), (3, "all"), (3, "none"), (2, "none"), (1, "none"), (3, "optimizer"))
CASES = (
    *(Case("gpt2-large", zero, offload, "none", 8) for zero, offload in SHARDINGS),
    Case("llama-3.2-3b", 2, "optimizer", "full", 4),
    Case("gpt2-xl", 1, "none", "full", 8),
    Case("llama-3.2-3b", 3, "all", "full", 4),
    Case("gpt2-xl", 2, "optimizer", "full", 8),
    Case("llama-3.2-3b", 2, "none", "full", 4),
    Case("gpt2-xl", 3, "none", "full", 8),
    Case("llama-2-7b", 3, "none", "full", 2),
    Case("gpt2-large", 2, "optimizer", "full", 8),
    Case("gpt2-large", 2, "optimizer", "none", 4, 2),
    Case("gpt2-xl", 3, "all", "full", 8),
    Case("gpt2-large", 3, "all", "full", 8),
    Case("llama-3.2-3b", 3, "none", "full", 4),
)  # fmt: skip


def plan_of(case: Case, num_gpus: int = 1, host_scale: float | None = None) -> Plan:
    """The plan of a case, also beside a host that was measured."""
    machine = replace(h200(), host=HOST, gpus_per_node=num_gpus)
    machine = beside_host(machine, machine, host_scale)
    workload = Workload(
        seq_len=1024, global_batch=case.micro_batch * case.accumulation, global_batch_pinned=True
    )
    knobs = {
        "precision": "bf16-master", "attention": "sdpa", "loss": "response", "packing": False, "compile": False,
        "allocator": "expandable", "zero": case.zero, "offload": case.offload, "checkpointing": case.checkpointing,
        "micro_batch": case.micro_batch, "accumulation": case.accumulation,
    }  # fmt: skip
    model = resolve_model(case.model)
    evaluator = Evaluator(model, workload, num_gpus=num_gpus, gpus_per_node=num_gpus)
    pins: dict[str, Any] = read_pins(knobs)
    strategy = Strategy(**pins)
    return plan_from_choice(
        Only(strategy, evaluator.estimate(strategy, machine)), model=model, hardware=machine, workload=workload,
        pinned=list(knobs), margin=0.05, minimize="time", command=["h200_shard.py", case.name],
    )  # fmt: skip


def held_bytes(plan: Plan) -> int:
    """What a dry run holds of the planned host memory: it saves nothing."""
    host = plan.memory.host
    return host.peak_bytes - host.by_category["checkpoint being saved"]


class HostWatch:
    """The most memory that the machine holds beyond what it held at the start."""

    def __init__(self) -> None:
        self.before = self.most = _held()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._ends.wait(SAMPLE_S):
            self.most = max(self.most, _held())

    def __enter__(self) -> HostWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def _held() -> int:
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def measured(case: Case, events: Path | None) -> dict[str, Any]:
    """One row."""
    plan = plan_of(case)
    gpu = plan.memory.gpu
    snapshot = None
    if events is not None and case.model == "gpt2-large":
        snapshot = f"/tmp/{case.name.replace(' ', '_')}.pickle"
    row: dict[str, Any] = {name: getattr(case, name) for name in COLUMNS[:-1]}
    row |= {
        "allocated_predicted": gpu.peak_allocated_bytes, "reserved_predicted": gpu.peak_reserved_bytes,
        "used_predicted": gpu.used_bytes, "host_predicted": held_bytes(plan),
        "step_s_predicted": plan.time.step_s,
    }  # fmt: skip
    with HostWatch() as host:
        try:
            found = measure_here(plan, steps=STEPS, snapshot=snapshot, timeout_s=240)
        except Exception as error:
            return row | {"status": f"{type(error).__name__}: {str(error)[-600:]}"}
    if snapshot is not None and events is not None and Path(snapshot).exists():
        _digest(Path(snapshot), events / f"{case.name.replace(' ', '_')}.json.gz")
    phases = found.get("phase_s", {})
    return row | {
        "status": "out of memory" if "out_of_memory" in found else "ok",
        "allocated": found.get("peak_allocated_bytes"), "reserved": found.get("peak_reserved_bytes"),
        "used": found.get("used_bytes"), "host": host.most - host.before, "host_rss": found.get("host_peak_bytes"),
        "step_s": found.get("step_s"), "host_scale": found.get("host_scale"), "first_step_s": found.get("first_step_s"),
        **{f"{name}_s": phases.get(name) for name in ("forward", "backward", "optimizer")},
        "phase_peak_bytes": json.dumps(found.get("phase_peak_bytes")),
    }  # fmt: skip


def _digest(snapshot: Path, out: Path) -> None:
    """The large blocks of the recorded step in order: action, address, bytes, innermost lines."""
    with snapshot.open("rb") as stream:
        trace = pickle.load(stream)["device_traces"][0]
    kept = []
    for entry in trace:
        if entry["size"] >= LARGE_BYTES and entry["action"] in ("alloc", "free_completed"):
            frames = [
                f"{Path(f['filename']).name}:{f['line']}:{f['name']}"
                for f in entry.get("frames", [])
            ]
            kept.append(
                [
                    entry["action"][0],
                    entry["addr"],
                    entry["size"],
                    [f for f in frames if ".py" in f][:FRAMES],
                ]
            )
    with gzip.open(out, "wt") as text:
        json.dump(kept, text)
    snapshot.unlink()


def judge(path: Path) -> None:
    """Errors by quantity, of this version."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["status"] == "ok"]
    for row in rows:
        case = Case(row["model"], int(row["zero"]), row["offload"], row["checkpointing"],
                    int(row["micro_batch"]), int(row["accumulation"]))  # fmt: skip
        plan = plan_of(case)
        gpu = plan.memory.gpu
        for name, value in zip(QUANTITIES, (gpu.peak_allocated_bytes, gpu.peak_reserved_bytes, gpu.used_bytes,
                                            held_bytes(plan), plan.time.step_s), strict=True):  # fmt: skip
            row[f"{name}_predicted"] = str(value)
        errors = "  ".join(f"{q} {_error(row, q):+7.2%}" for q in QUANTITIES)
        if row.get("host_scale"):
            seconds = plan_of(case, host_scale=float(row["host_scale"])).time.step_s or 0.0
            errors += f"  beside its host {seconds / float(row['step_s']) - 1:+.2%}"
        print(f"{row['name']:<48} {errors}")
    for quantity in QUANTITIES:
        errors = [_error(row, quantity) for row in rows]
        print(
            f"{quantity:<10} mean {fmean(map(abs, errors)):.2%} worst {max(errors, key=abs):+.2%}"
        )


def _error(row: dict[str, str], quantity: str) -> float:
    return float(row[f"{quantity}_predicted"]) / float(row[quantity]) - 1


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--events", type=Path)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--longest", type=float, default=LONGEST_S, help="seconds of a case")
    parser.add_argument("--skip", type=int, default=0, help="so many of the cases")
    parser.add_argument(
        "--only", default="", help="cases whose names hold one of these, with commas"
    )
    args = parser.parse_args()
    if args.judge:
        judge(args.out)
        return
    deadline = time.monotonic() + args.seconds
    wanted = args.only.split(",")
    cases = [c for c in CASES[args.skip :] if any(part in c.name for part in wanted)]
    if any(case.offload != "none" for case in cases):
        build = "from sftplan.train.engine import *; import torch; load_deepspeed(torch.device('cuda')); build_cpu_adam()"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", build], check=False)
        print(f"CPUAdam {time.perf_counter() - start:.0f} s", flush=True)
    for case in cases:
        begun = time.monotonic()
        if begun + args.longest > deadline:
            print(f"{case.name}: not reached")
            continue
        row = measured(case, args.events)
        fresh = not args.out.exists()
        with args.out.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, (*COLUMNS, *MEASURED))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        took = time.monotonic() - begun
        print(f"{case.name}: {row['status']} in {took:.0f} s", flush=True)
    judge(args.out)


if __name__ == "__main__":
    main()
