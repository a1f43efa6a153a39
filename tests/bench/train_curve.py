"""Two loss curves side by side, and the noise that their distance is judged by."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

WINDOW = 20  # steps per mean
OURS, OTHER, PLAIN = "curve-master", "curve-other-seed", "reference"


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
    """Print means over windows, and whether the distance is within what another seed changes."""
    curves = {row["name"]: row["losses"] for row in rows if row.get("losses")}
    if OURS not in curves or PLAIN not in curves:
        return
    ours, plain, other = curves[OURS], curves[PLAIN], curves.get(OTHER)
    print(f"\n{'steps':>9} {'ours':>9} {'reference':>10} {'distance':>9} {'another seed':>13}")
    for number, (mine, theirs) in enumerate(zip(windows(ours), windows(plain), strict=True)):
        at = number * WINDOW
        seed = ""
        if other:
            seed = f"{statistics.fmean(windows(other)[number]) - statistics.fmean(mine):+13.4f}"
        mean, reference = statistics.fmean(mine), statistics.fmean(theirs)
        print(
            f"{at + 1:4}-{at + WINDOW:<4} {mean:9.4f} {reference:10.4f} {mean - reference:+9.4f} {seed}"
        )
    mean, error = distances(ours, plain)
    print(f"ours minus reference: {mean:+.5f} ± {error:.5f} (standard error over windows)")
    if other:
        seeds, seeds_error = distances(other, ours)
        print(f"another seed minus ours: {seeds:+.5f} ± {seeds_error:.5f}")
        square = statistics.fmean((a - b) ** 2 for a, b in zip(other, ours, strict=True))
        mine = statistics.fmean((a - b) ** 2 for a, b in zip(ours, plain, strict=True))
        ratio = math.sqrt(mine / square) if square else math.inf
        print(f"root mean square distance: {ratio:.2f} of what another seed makes")
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
