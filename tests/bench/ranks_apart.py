"""What the benchmarks of several GPUs share: a function in fresh ranks, rows in a file, a table at the end."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftplan.verify.processes import run_processes

SETTINGS = "settings.json"


def in_ranks(module: str, settings: dict[str, Any], ranks: int, *, limit_s: float) -> list[Any]:
    """What `python -m module FOLDER` left in each of `ranks` fresh processes; the folder has the settings."""
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory(prefix="sftplan-bench-") as name:
        folder = Path(name)
        (folder / SETTINGS).write_text(json.dumps(settings))
        return run_processes(folder, ranks, module=module, timeout_s=limit_s)


class Deadline:
    """Seconds that are left; nothing is begun without enough of them."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()


def rows_of(
    names: Mapping[str, Callable[[], dict[str, Any]]], deadline: Deadline, *, longest_s: float
) -> Iterator[dict[str, Any]]:
    """A row of each; one that fails, or that there is no time for, has it as its status."""
    for name, function in names.items():
        row: dict[str, Any] = {"name": name}
        begun = time.monotonic()
        if deadline.left_s() < longest_s:
            row["status"] = "not reached"
        else:
            try:
                row |= {"status": "ok"} | function()
            except Exception as error:  # the others still count
                row["status"] = f"{type(error).__name__}: {str(error)[-900:]}"
        row["took_s"] = round(time.monotonic() - begun, 1)
        print(f"{name}: {row['status'][-300:]} in {row['took_s']:.0f} s", flush=True)
        yield row


def append(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """One more line of a CSV file; what has no column is left out."""
    fresh = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows in columns as wide as they need."""
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else str(value).split("\n")[0][:60]
