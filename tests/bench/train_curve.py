"""Two loss curves side by side, and the noise that their distance is judged by."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

WINDOW = 20  # steps per mean
# CONTROL is the plain loop again with the rows of each batch in the opposite order: the same sums in another
# order, so what it differs by is rounding alone.
OURS, PLAIN, CONTROL = "curve-master", "reference", "reference-reversed"


def windows(values: list[float]) -> list[list[float]]:
    """The values in windows of WINDOW steps; an incomplete one at the end is left out.

    >>> [len(window) for window in windows([1.0] * 47)]
    [20, 20]
    """
    return [values[at : at + WINDOW] for at in range(0, len(values) - WINDOW + 1, WINDOW)]


def distances(ours: list[float], plain: list[float]) -> tuple[float, float]:
    """Mean distance of two curves of the same batches, and its standard error from window means.

    Windows, not steps, are what is independent: the distance of one step lives on in the next.

    >>> distances([1.0] * 20 + [3.0] * 20, [1.0] * 40)
    (1.0, 1.0)
    """
    apart = [
        statistics.fmean(window)
        for window in windows([a - b for a, b in zip(ours, plain, strict=True)])
    ]
    if len(apart) < 2:
        return statistics.fmean(a - b for a, b in zip(ours, plain, strict=True)), math.nan
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))


def compare(rows: list[dict[str, Any]]) -> None:
    """Print means over windows, and whether the distance is within what rounding alone changes."""
    curves = {row["name"]: row["losses"] for row in rows if row.get("losses")}
    if OURS not in curves or PLAIN not in curves:
        return
    plain = curves.pop(PLAIN)
    print(f"\n{'steps':>9} {PLAIN:>10} " + " ".join(f"{name:>20}" for name in curves))
    apart = {name: [a - b for a, b in zip(c, plain, strict=True)] for name, c in curves.items()}
    for number, theirs in enumerate(windows(plain)):
        at = number * WINDOW
        cells = (f"{statistics.fmean(windows(d)[number]):+20.4f}" for d in apart.values())
        print(f"{at + 1:4}-{at + WINDOW:<4} {statistics.fmean(theirs):10.4f} {' '.join(cells)}")
    for name, curve in curves.items():
        mean, error = distances(curve, plain)
        square = math.sqrt(statistics.fmean(d * d for d in apart[name]))
        print(
            f"{name} minus {PLAIN}: {mean:+.5f} ± {error:.5f} (standard error over windows), root mean square {square:.5f}"
        )
    scatter = statistics.fmean(
        statistics.stdev(window) / math.sqrt(WINDOW) for window in windows(plain)
    )
    print(f"standard error of a window's mean, from batch to batch: {scatter:.5f}", flush=True)


def write_curves(rows: list[dict[str, Any]], file: Path) -> None:
    """One line per step, one column per curve."""
    curves = {row["name"]: row["losses"] for row in rows if row.get("losses")}
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", *curves])
        writer.writerows(
            [number, *values]
            for number, values in enumerate(zip(*curves.values(), strict=True), start=1)
        )
