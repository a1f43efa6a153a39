"""Several GPUs of one machine, predicted against measured; tables last, everything in CSV files of a folder.

    python h200_ranks.py OUT --gpus 2                  dry runs of ZeRO-0..3 and offload
    python h200_ranks.py OUT --gpus 2 --collectives    collectives by size, and what NCCL takes
    python h200_ranks.py OUT --gpus 2 --scaling        tokens/s on 1 and on all GPUs, stage 0
    python h200_ranks.py OUT --gpus 2 --curve          losses of stages 0..3 beside those of one GPU
    python h200_ranks.py OUT --judge                   errors of OUT/ranks.csv, or of OUT itself, by this version, without a GPU

Several modes in one call run in the order collectives, dry runs (with --dry), scaling, curve. `--tiny`
rehearses on processors. `--only A,B` takes the dry runs whose names hold A or B, `--skip N` leaves N out.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import ranks_cases
from h200_shard import HostWatch, held_bytes
from ranks_apart import Deadline, append, in_ranks, rows_of, table
from ranks_cases import Case, machine, plan_of

from sftplan.detect.gpus import detect
from sftplan.facts.hardware import Hardware, Host
from sftplan.train.demo import write_demo_model
from sftplan.verify.fit import beside_host
from sftplan.verify.profile import measure_here

STEPS = 4  # that are timed
LONGEST_S = 100.0  # of a dry run or a training: none is begun with less time left
LIMIT_S = 240.0  # a process that takes longer hangs
TRAINING_LIMIT_S = 90.0  # likewise, of a training, which takes 25 to 65 s
QUANTITIES = ("allocated", "reserved", "used", "host", "step_s")
PHASES = ("data", "forward", "backward", "communication", "optimizer")
COLUMNS = (
    "name", "status", "gpus", "hardware", "host_cpus", *ranks_cases.COLUMNS,
    *(f"{q}{end}" for q in QUANTITIES for end in ("", "_predicted")), *(f"{p}_s" for p in PHASES),
    "communication_s_predicted", "host_rss", "host_scale", "first_step_s", "tokens_per_s", "outside", "taken_meanwhile",
    "phase_peak_bytes", "step_seconds", "took_s",
)  # fmt: skip
SHOWN = ("name", "status", *QUANTITIES, "beside_host", *(f"{p}_s" for p in PHASES[1:]))
MIB = 2**20
SIZES = [2**16, *(MIB * 4**power for power in range(6))]  # 64 KB, then 1 MB to 1 GB


def predicted(case: Case, hardware: Hardware) -> dict[str, Any]:
    """The plan's figures."""
    plan = plan_of(case, hardware)
    gpu = plan.memory.gpu
    figures = (
        gpu.peak_allocated_bytes,
        gpu.peak_reserved_bytes,
        gpu.used_bytes,
        held_bytes(plan),
        plan.time.step_s,
    )
    named = {f"{q}_predicted": value for q, value in zip(QUANTITIES, figures, strict=True)}
    return named | {"communication_s_predicted": plan.time.communication_s}


def dry_run(case: Case, hardware: Hardware, *, cpu: bool) -> dict[str, Any]:
    """One row."""
    row = asdict(case) | predicted(case, hardware)
    row |= {
        "gpus": hardware.num_gpus,
        "hardware": hardware.name,
        "host_cpus": hardware.host.num_cpus,
    }
    with HostWatch() as host:
        found = measure_here(plan_of(case, hardware), steps=STEPS, cpu=cpu, timeout_s=LIMIT_S)
    if "out_of_memory" in found:
        return row | {"status": f"out of memory: {found['out_of_memory']}"}
    phases = found["phase_s"]
    return row | {
        "allocated": found["peak_allocated_bytes"], "reserved": found["peak_reserved_bytes"],
        "used": found["used_bytes"], "host": host.most - host.before, "host_rss": found["host_peak_bytes"],
        "host_scale": found.get("host_scale"), "step_s": found["step_s"], "first_step_s": found["first_step_s"], "outside": found["outside_bytes"],
        "tokens_per_s": found["tokens_per_s"], "taken_meanwhile": found["taken_meanwhile_bytes"],
        **{f"{name}_s": phases.get(name) for name in PHASES}, "step_seconds": json.dumps(found["step_seconds"]),
        "phase_peak_bytes": json.dumps(found["phase_peak_bytes"]),
    }  # fmt: skip


def dry_runs(args: argparse.Namespace, hardware: Hardware, deadline: Deadline) -> None:
    """All cases, the most important first."""
    cases = ranks_cases.tiny_cases(args.model) if args.tiny else ranks_cases.CASES[args.skip :]
    if args.only:
        cases = tuple(
            case for case in cases if any(part in case.name for part in args.only.split(","))
        )
    if not args.tiny and any(case.offload != "none" for case in cases):
        build = "from sftplan.train.engine import *; import torch; load_deepspeed(torch.device('cuda')); build_cpu_adam()"
        subprocess.run([sys.executable, "-c", build], check=False)
        print(f"CPUAdam is there, {deadline.left_s():.0f} s left", flush=True)
    names = {case.name: lambda case=case: dry_run(case, hardware, cpu=args.tiny) for case in cases}
    path = args.out / "ranks.csv"
    for row in rows_of(names, deadline, longest_s=args.longest):
        append(path, COLUMNS, row)
    judge(path)


def judge(path: Path) -> None:
    """Errors by quantity, of this version."""
    with path.open(newline="") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    shown: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {"name": row["name"], "status": row["status"]}
        if row["status"] == "ok":
            texts = {name: row[name] for name in ranks_cases.COLUMNS}
            whole = ("zero", "micro_batch", "accumulation", "seq_len")
            case = Case(**(texts | {name: int(texts[name]) for name in whole}))
            host = Host(num_cpus=int(row["host_cpus"]))
            hardware = machine(row["hardware"], int(row["gpus"]), host)
            row |= predicted(case, hardware)
            if row.get("host_scale"):  # as slow as the host was just after
                slow = beside_host(hardware, hardware, float(row["host_scale"]))
                seconds = plan_of(case, slow).time.step_s
                line["beside_host"] = (
                    f"{row['host_scale'][:4]} {seconds / float(row['step_s']) - 1:+.1%}"
                )
            line |= {q: f"{float(row[q]):.4g} {_error(row, q):+.1%}" for q in QUANTITIES if row[q]}
            line |= {f"{p}_s": float(row[f"{p}_s"]) for p in PHASES if row[f"{p}_s"]}
        shown.append(line)
    table(SHOWN, shown)
    for quantity in QUANTITIES:
        errors = [_error(row, quantity) for row in rows if row["status"] == "ok" and row[quantity]]
        if errors:
            worst = max(errors, key=abs)
            print(
                f"{quantity:<10} mean {fmean(map(abs, errors)):.2%} worst {worst:+.2%} of {len(errors)}"
            )


def _error(row: dict[str, Any], quantity: str) -> float:
    return float(row[f"{quantity}_predicted"]) / float(row[quantity]) - 1


def collectives(args: argparse.Namespace) -> None:
    """By size, and the driver's memory after each first."""
    asked = {"cpu": args.tiny, "sizes": [2**16, MIB] if args.tiny else SIZES}
    found = in_ranks("ranks_collectives", asked, args.gpus, limit_s=LIMIT_S)
    columns = ("collective", "bytes", "ranks", "seconds", "bus_bytes_per_s")
    for row in found[0]["rows"]:
        append(args.out / "collectives.csv", columns, row)
    memory = [{"rank": rank, "after": what, "outside_bytes": nbytes}
              for rank, each in enumerate(found) for what, nbytes in each["memory"]]  # fmt: skip
    for row in memory:
        append(args.out / "nccl_memory.csv", ("rank", "after", "outside_bytes"), row)
    print({k: v for k, v in found[0].items() if k not in ("rows", "memory")})
    table(columns, found[0]["rows"])
    table(("rank", "after", "outside_bytes"), memory)


def scaling(args: argparse.Namespace, deadline: Deadline) -> None:
    """The same rows per GPU, on one and on all of them."""
    rows = (2,) if args.tiny else (32, 8)
    runs = {}
    for micro_batch in rows:
        for gpus in (1, args.gpus):
            case = _training_case(args, micro_batch=micro_batch)
            runs[f"{micro_batch} rows on {gpus}"] = _training(
                args, case, gpus, steps=10 if args.tiny else 40
            )
    columns = ("name", "status", "tokens_per_s", "step_s", "reserved", "device", "efficiency")
    found = list(rows_of(runs, deadline, longest_s=args.longest))
    for alone, together in zip(found[::2], found[1::2], strict=True):
        if "tokens_per_s" in alone and "tokens_per_s" in together:
            together["efficiency"] = together["tokens_per_s"] / alone["tokens_per_s"] / args.gpus
    for row in found:
        append(args.out / "scaling.csv", columns, row)
    table(columns, found)


def curve(args: argparse.Namespace, deadline: Deadline) -> None:
    """Losses of all stages beside one GPU with as many passes as there are GPUs; the same weights and rows."""
    steps = 10 if args.tiny else 40
    with tempfile.TemporaryDirectory(prefix="sftplan-weights-") as weights:
        in_ranks("ranks_training", {"save": args.model, "weights": weights}, 1, limit_s=LIMIT_S)
        more = {
            "weights": weights,
            "no_dropout": True,
            "learning_rate": args.rate,
            "warmup_steps": steps,
        }
        alone = _training_case(args, micro_batch=8, style="uncompiled", accumulation=args.gpus)
        runs = {"one": _training(args, alone, 1, steps=steps, **more)}
        for zero in map(int, args.zero.split(",")):
            case = _training_case(args, micro_batch=8, style="uncompiled", zero=zero)
            runs[f"zero-{zero}"] = _training(args, case, args.gpus, steps=steps, **more)
        runs["one, again"] = runs["one"]
        found: dict[str, dict[str, Any]] = {}
        for row in rows_of(runs, deadline, longest_s=args.longest):
            found[row["name"]] = row
            _write_curves(args.out / "curves.csv", found)  # at once: a run may be stopped
    curves = {name: row["losses"] for name, row in found.items() if row.get("losses")}
    for name, row in found.items():
        if name in curves and "one" in curves:
            apart = [abs(a - b) for a, b in zip(curves["one"], curves[name], strict=True)]
            row |= {"first": curves[name][0], "last": curves[name][-1], "max_difference": max(apart),
                    "mean_difference": fmean(apart)}  # fmt: skip
    table(
        ("name", "status", "first", "last", "max_difference", "mean_difference", "step_s"),
        list(found.values()),
    )


def _write_curves(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """A column of losses for each run that ended."""
    curves = {name: row["losses"] for name, row in found.items() if row.get("losses")}
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", *curves])
        writer.writerows([n, *each] for n, each in enumerate(zip(*curves.values(), strict=True), 1))


def _training_case(args: argparse.Namespace, **knobs: Any) -> Case:
    fixed = {"model": args.model, "zero": 0, "style": "uncompiled" if args.tiny else "packed"}
    small = {"micro_batch": 2, "seq_len": 256} if args.tiny else {}
    return Case(**(fixed | knobs | small))


def _training(args: argparse.Namespace, case: Case, gpus: int, *, steps: int, **more: Any) -> Any:
    asked = {
        "case": asdict(case), "steps": steps, "cpu": args.tiny, "no_dropout": False, "learning_rate": 1e-5,
        "warmup_steps": 1, "examples": 400 if args.tiny else 4000,
    }  # fmt: skip
    return lambda: in_ranks("ranks_training", asked | more, gpus, limit_s=TRAINING_LIMIT_S)[0]


def here(args: argparse.Namespace) -> Hardware:
    """This machine's profile without what was calibrated on it; for a rehearsal, any."""
    if args.tiny:
        return machine("h200-sxm", args.gpus)
    found = detect()
    print(f"{found.gpus_per_node} x {found.name}, {found.host}", flush=True)
    return machine(found.name, args.gpus, found.host)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument(
        "--longest", type=float, default=LONGEST_S, help="seconds that a run may need"
    )
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument(
        "--rate", type=float, default=2e-5, help="learning rate that --curve warms up to"
    )
    parser.add_argument("--zero", default="3,2,1,0", help="stages of --curve, with commas")
    parser.add_argument("--model", default="gpt2-large", help="of --scaling and --curve")
    for mode in ("dry", "collectives", "scaling", "curve", "judge", "tiny"):
        parser.add_argument(f"--{mode}", action="store_true")
    args = parser.parse_args()
    deadline = Deadline(args.seconds)
    if args.judge:
        judge(args.out if args.out.suffix == ".csv" else args.out / "ranks.csv")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            write_demo_model(Path(folder) / "demo")
            args.model, args.longest = str(Path(folder) / "demo"), 20.0
        if args.collectives:
            collectives(args)
        if args.dry or not (args.collectives or args.scaling or args.curve):
            dry_runs(args, here(args), deadline)
        if args.scaling:
            scaling(args, deadline)
        if args.curve:
            curve(args, deadline)


if __name__ == "__main__":
    main()
