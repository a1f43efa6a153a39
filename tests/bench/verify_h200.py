"""Predicted against measured on a GPU: many configurations of our own step, and plans under memory caps.

    python tests/bench/verify_h200.py OUT.csv --seconds 540            the cases of verify_cases.py
    python tests/bench/verify_h200.py OUT.csv --fresh 6 --seconds 300  some of them in a process each
    python tests/bench/verify_h200.py OUT.csv --caps --seconds 540     plans under caps, then what lies beside them
    python tests/bench/verify_h200.py OUT.csv --judge [--calibration FILE]   no GPU: errors, by half

A run goes on where OUT.csv ends; --done FILE names more rows that need no repeating. One process of the dry
run's own code (sftplan/verify/run.py) takes one case after the other, for each allocator setting: between
cases the model, the compiler's graphs and cuBLAS's workspaces go and the allocator's cache is emptied;
`left_bytes` is what stays reserved all the same, and a process that keeps more than LEFT_BYTES is replaced.
Shared are the CUDA context, whose kernels add up (hence `used` is at most that much higher than alone;
--fresh tells), and the compiler's files on disk (hence no start-up times here). `host_scale`
is how slowly the host issued operations before, between and after the timed rounds, against the reference host.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from verify_cases import COLUMNS, MARGIN, Case, cases, plan_of

from sftplan.plan.file import read_plan, write_plan
from sftplan.plan.record import Plan

LEFT_BYTES = 64 * 2**20
STUCK_S = 200.0  # a case that says nothing for so long is given up
PLANNERS = max(1, (os.cpu_count() or 2) - 2)
MEASURED = (
    "status", "allocated", "allocated_predicted", "reserved", "reserved_predicted", "used", "used_predicted",
    "outside_bytes", "step_s", "step_s_predicted", "forward_s", "backward_s", "optimizer_s", "data_s",
    "tokens_per_s", "mfu_fraction", "first_step_s", "phase", "left_bytes", "fresh", "host_scale", "gpu", "torch", "transformers", "driver",
)  # fmt: skip


def row_of(plan: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """What was predicted beside what was measured."""
    gpu, phases = plan.memory.gpu, found.get("phase_s", {})
    out = found.get("out_of_memory")
    status = found.get("failed") or ("out of memory" if out else "ok")
    versions = found.get("versions", {})
    return {
        "status": status, "allocated": found.get("peak_allocated_bytes"), "allocated_predicted": gpu.peak_allocated_bytes,
        "reserved": found.get("peak_reserved_bytes"), "reserved_predicted": gpu.peak_reserved_bytes,
        "used": found.get("used_bytes"), "used_predicted": gpu.used_bytes,
        **{name: found.get(name) for name in ("outside_bytes", "step_s", "tokens_per_s", "mfu_fraction", "first_step_s", "left_bytes", "fresh", "host_scale")},
        "step_s_predicted": plan.time.step_s, "phase": out["phase"] if out else "",
        **{f"{name}_s": phases.get(name) for name in ("forward", "backward", "optimizer", "data")},
        **{name: versions.get(name) for name in ("gpu", "torch", "transformers", "driver")},
    }  # fmt: skip


class Table:
    """The CSV file: rows as they become known, never twice."""

    def __init__(self, path: Path, columns: tuple[str, ...], done: list[Path]) -> None:
        self.path, self.columns = path, columns
        self.rows: dict[str, dict[str, str]] = {}
        for file in [path, *done]:
            if file.exists():
                with file.open(newline="") as stream:
                    self.rows |= {row["name"]: row for row in csv.DictReader(stream)}

    def add(self, row: dict[str, Any]) -> None:
        """One more row, on disk at once."""
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns, extrasaction="ignore")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        self.rows[row["name"]] = {k: "" if v is None else str(v) for k, v in row.items()}
        print(f"{row['name']}: {row['status']} {row.get('step_s') or '-'} s", flush=True)


def work(folder: Path) -> None:
    """A worker: one job after the other, each result a file of its own."""
    jobs = json.loads((folder / "jobs.json").read_text())
    from sftplan.train.launch import set_allocator
    from sftplan.verify.occupancy import taken_bytes
    from sftplan.verify.profile import MORE_ROUNDS_S
    from sftplan.verify.request import Request

    before = taken_bytes(0)
    set_allocator(read_plan(folder / f"{jobs[0]['id']}.plan"))
    import torch

    from sftplan.verify.run import dry_run

    cpu = not torch.cuda.is_available()
    for job in jobs:
        more_s = 0.0 if cpu or job["cap_bytes"] is not None else MORE_ROUNDS_S
        request = Request(
            steps=job["steps"], more_rounds_s=more_s, cap_bytes=job["cap_bytes"], timeline=False, cpu=cpu
        )  # fmt: skip
        if not cpu and job["cap_bytes"] is None:
            torch.cuda.set_per_process_memory_fraction(1.0)
        cleaned(torch)
        try:
            found = dry_run(
                read_plan(folder / f"{job['id']}.plan"), request, taken_before_bytes=before
            )
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        left = cleaned(torch)
        draft = folder / f"{job['id']}.part"
        draft.write_text(json.dumps({**found, "left_bytes": left}))
        draft.rename(folder / f"{job['id']}.result")
        if left > LEFT_BYTES:
            return


def cleaned(torch: Any) -> int:
    """Let everything of a case go; bytes that stay reserved."""
    torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_reserved())


def run_jobs(
    jobs: list[dict[str, Any]], deadline: float, done: Any, *, per_process: int = 10**6
) -> None:
    """Jobs of {id, plan, steps, cap_bytes}, grouped by allocator, through workers until the deadline."""
    with tempfile.TemporaryDirectory() as name:
        for setting in ("expandable", "default"):
            waiting = [job for job in jobs if job["plan"].strategy.allocator == setting]
            while waiting and time.monotonic() < deadline:
                waiting = _one_worker(Path(name), waiting, per_process, deadline, done)


def _one_worker(
    folder: Path, waiting: list[dict[str, Any]], most: int, deadline: float, done: Any
) -> list[dict[str, Any]]:
    """Start one worker; the jobs that are left when it ends."""
    for job in waiting[:most]:
        write_plan(job["plan"], folder / f"{job['id']}.plan")
    plain = [{k: job[k] for k in ("id", "steps", "cap_bytes")} for job in waiting[:most]]
    (folder / "jobs.json").write_text(json.dumps(plain))
    log = (folder / "log.txt").open("wb")
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", str(folder)], stdout=log, stderr=log
    )
    last, number = time.monotonic(), 0
    try:
        while number < len(plain):
            file = folder / f"{plain[number]['id']}.result"
            ended = process.poll() is not None
            if file.exists():
                done(waiting[number], json.loads(file.read_text()))
                number, last = number + 1, time.monotonic()
            elif ended and number:
                break  # it kept too much, or died in the next one, which the next worker begins with
            elif ended or time.monotonic() - last > STUCK_S:
                tail = (folder / "log.txt").read_text(errors="replace")[-300:]
                done(
                    waiting[number],
                    {"failed": "died: " + " ".join(tail.split()) if ended else "stuck"},
                )
                number += 1
                break
            elif time.monotonic() > deadline:
                return []
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        log.close()
    return waiting[number:]


def measure_cases(args: argparse.Namespace) -> None:
    """The cases of verify_cases.py."""
    deadline = time.monotonic() + args.seconds
    table = Table(args.out, (*COLUMNS, *MEASURED), args.done)
    suffix = " (fresh)" if args.fresh else ""
    chosen = cases(args.count) if args.again is None else cases_in(args.again)
    if args.fresh:
        chosen = chosen[:: max(1, len(chosen) // args.fresh)][: args.fresh]
    if args.only:
        chosen = [case for case in chosen if case.compile == (args.only == "compiled")]
    chosen = [case for case in chosen if case.name + suffix not in table.rows]
    with ProcessPoolExecutor(PLANNERS) as pool:
        plans = list(pool.map(plan_of, chosen))
    by_id = {
        f"case-{i}": (case, plan) for i, (case, plan) in enumerate(zip(chosen, plans, strict=True))
    }
    jobs = [
        {"id": i, "plan": plan, "steps": args.steps, "cap_bytes": None}
        for i, (_, plan) in by_id.items()
    ]

    def done(job: dict[str, Any], found: dict[str, Any]) -> None:
        case, plan = by_id[job["id"]]
        found["fresh"] = bool(args.fresh)
        row = {name: getattr(case, name) for name in COLUMNS} | {"name": case.name + suffix}
        table.add(row | row_of(plan, found))

    run_jobs(jobs, deadline, done, per_process=1 if args.fresh else 10**6)
    print(
        f"{len(table.rows)} rows, {sum(1 for c in chosen if c.name + suffix not in table.rows)} not reached"
    )


def cases_in(path: Path) -> list[Case]:
    """Those of a file of rows, each in its half."""
    with path.open(newline="") as stream:
        return [case_of(row) for row in csv.DictReader(stream)]


def case_of(row: dict[str, str]) -> Case:
    """The case of a row."""
    return Case(
        **{name: row[name] for name in ("model", "precision", "checkpointing", "attention", "loss", "allocator", "half")},
        **{name: int(row[name]) for name in ("seq_len", "micro_batch", "accumulation")},
        **{name: row[name] == "True" for name in ("packing", "compile")},
    )  # fmt: skip


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--count", type=int, default=72)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fresh", type=int, default=0)
    parser.add_argument("--caps", action="store_true")
    parser.add_argument("--kept", action="store_true", help="the choices, each kept to its cap")
    parser.add_argument("--near", type=float, default=0.03, help="of the grid, by predicted time")
    parser.add_argument("--gib", help="some of the caps, with commas")
    parser.add_argument("--margin", type=float, default=MARGIN, help="kept free under caps")
    parser.add_argument("--models", help="some of the models under caps, with commas")
    parser.add_argument("--again", type=Path, help="measure the cases of this file's rows anew")
    parser.add_argument("--only", choices=("compiled", "eager"), help="some of the cases")
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--profile", help="of the GPU whose rows under caps are judged")
    parser.add_argument("--done", type=Path, action="append", default=[])
    args = parser.parse_args()
    if args.judge and args.caps:
        from verify_caps import judge_caps

        judge_caps(args)
    elif args.judge:
        from verify_judge import judge

        judge(args.out, args.calibration)
    elif args.caps:
        from verify_caps import measure_caps

        measure_caps(args)
    else:
        measure_cases(args)


if __name__ == "__main__":
    main()
