"""Errors of the rows that verify_h200.py wrote: as planned, and after calibration on one half of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from verify_cases import h200, plan_of

from sftplan.facts.calibration import FITTED, Calibration, read_calibration, with_rates
from sftplan.facts.hardware import Hardware
from sftplan.plan.timeline import passes_captured, strategy_of
from sftplan.verify.calibrate import observation_of, with_observations
from sftplan.verify.fit import beside_host

QUANTITIES = ("allocated", "reserved", "used", "step_s")
WORST_STEP = 0.10  # what the time of a step may be off


def judge(path: Path, calibration: Path | None) -> None:
    """Print mean and worst error of each quantity by half, before and after calibration.

    `calibration` is a file of `sftplan detect --calibrate` to start from; without it, the profile.
    """
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("status", "ok") == "ok"]
    print("as the profile has it")
    _report([again(row, h200()) for row in rows])
    made = calibrated_on([row for row in rows if row["half"] == "calibration"], calibration)
    machine, start = (
        with_rates(h200(), each, where="") for each in (made, replace(made, fitted={}))
    )
    rates = {name: round(getattr(machine.rates, name), 4) for name in (*FITTED, "context_bytes")}  # fmt: skip
    print(f"calibrated: {rates}, profile {h200().rates.context_bytes}")
    _report([again(row, machine) for row in rows])
    print("calibrated, each with its host as it was beside it")
    _report([again(row, beside_host(machine, start, _host(row))) for row in rows])


def calibrated_on(rows: list[dict[str, str]], file: Path | None) -> Calibration:
    """What `verify` would have learned from these dry runs."""
    from verify_h200 import case_of

    start = _empty() if file is None else replace(read_calibration(file), observations=[])
    seen = []
    for row in rows:
        outside = row["outside_bytes"]
        found = {"step_s": float(row["step_s"]), "outside_bytes": int(outside) if outside else None,
                 "host_scale": _host(row)}  # fmt: skip
        seen.append(observation_of(plan_of(case_of(row)), found))
    return with_observations(start, seen, h200())


def _host(row: dict[str, str]) -> float | None:
    """How slow the host was beside a row, if that was measured."""
    return float(row["host_scale"]) if row["host_scale"] else None


def _empty() -> Calibration:
    gpu = h200().gpu
    return Calibration(
        gpu=gpu.nvml_name, memory_bytes=gpu.memory_bytes, measured_at="", driver=None, versions={}, measured={}
    )  # fmt: skip


def again(row: dict[str, str], machine: Hardware) -> dict[str, Any]:
    """The row with what this version's plan predicts on a machine."""
    from verify_h200 import case_of

    plan = plan_of(case_of(row), machine)
    gpu = plan.memory.gpu
    captured = passes_captured(plan, strategy_of(plan.strategy))
    return row | {
        "captured": captured, "allocated_predicted": gpu.peak_allocated_bytes, "reserved_predicted": gpu.peak_reserved_bytes,
        "used_predicted": gpu.used_bytes, "step_s_predicted": plan.time.step_s,
    }  # fmt: skip


def _report(rows: list[dict[str, Any]]) -> None:
    for half in ("calibration", "held-out"):
        chosen = [row for row in rows if row["half"] == half]
        print(f"{half}: {len(chosen)} rows")
        for quantity in QUANTITIES:
            print_errors(quantity, chosen)
    for captured, words in ((True, "captured"), (False, "waiting for a host")):
        chosen = [row for row in rows if row["captured"] is captured]
        near = sum(abs(_error(row, "step_s")) <= WORST_STEP for row in chosen)
        print(f"{words}: {len(chosen)} rows, {near} within {WORST_STEP:.0%}")
        print_errors("step_s", chosen)


def print_errors(quantity: str, rows: list[dict[str, Any]]) -> None:
    """Mean, signed mean and worst error of a quantity."""
    errors = [(_error(row, quantity), row["name"]) for row in rows if row[quantity]]
    if errors:
        worst = max(errors, key=lambda e: abs(e[0]))
        mean, signed = fmean(abs(e) for e, _ in errors), fmean(e for e, _ in errors)
        print(
            f"  {quantity:<10} mean {mean:7.2%}  signed {signed:+7.2%}  worst {worst[0]:+7.2%}  {worst[1]}"
        )


def _error(row: dict[str, Any], quantity: str) -> float:
    """predicted / measured - 1."""
    return float(row[f"{quantity}_predicted"]) / float(row[quantity]) - 1
