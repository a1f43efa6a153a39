"""Errors of the rows that verify_h200.py wrote, for calibration and held out; and a calibration from the first half."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean

QUANTITIES = ("allocated", "reserved", "used", "step_s")


def judge(path: Path, calibration: Path | None) -> None:
    """Print mean and worst error of each quantity, by half, and the rows that are off most."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["status"] == "ok"]
    for half in ("calibration", "held-out"):
        chosen = [row for row in rows if row["half"] == half]
        print(f"{half}: {len(chosen)} rows")
        for quantity in QUANTITIES:
            errors = [(_error(row, quantity), row["name"]) for row in chosen if row[quantity]]
            if errors:
                worst = max(errors, key=lambda e: abs(e[0]))
                mean, signed = fmean(abs(e) for e, _ in errors), fmean(e for e, _ in errors)
                print(
                    f"  {quantity:<10} mean {mean:7.2%}  signed {signed:+7.2%}  worst {worst[0]:+7.2%}  {worst[1]}"
                )


def _error(row: dict[str, str], quantity: str) -> float:
    """predicted / measured - 1."""
    return float(row[f"{quantity}_predicted"]) / float(row[quantity]) - 1
