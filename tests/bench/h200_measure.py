"""One measurement campaign: every table of the h200_* scripts, packed into $OUT (at most eight files).

`python h200_measure.py [--tiny] [--seconds 540] [PART ...]`; parts run in order, each in processes of its own,
and what a part has written is packed when it ends or when its time is up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).parent
OUT = Path(os.environ.get("OUT", "/tmp/h200-out"))
WORK = Path("/tmp/h200-work")
TINY = ["--tiny"] if "--tiny" in sys.argv else []
BEGAN = time.time()
TOTAL = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 540.0
WORKERS = 7
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """One script in a process of its own, its output in a log beside the results."""
    log = (WORK / f"{script}-{len(list(WORK.glob('*.log')))}.log").open("w")
    command = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments), *TINY]
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> None:
    """Wait that long at most, and never past the campaign's end; then stop what is left."""
    until = min(time.time() + seconds, BEGAN + TOTAL - 8)
    for process in processes:
        try:
            process.wait(max(0.1, until - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            print("stopped:", process.args)


def pack(name: str, pattern: str) -> None:
    """The matching results as one archive in $OUT."""
    with tarfile.open(OUT / f"{name}.tar", "w") as archive:
        for path in sorted(WORK.glob(pattern)):
            archive.add(path, arcname=path.name)
    print(f"{name}.tar: {(OUT / f'{name}.tar').stat().st_size / 1e6:.1f} MB", flush=True)


def part_kernels() -> None:
    """Context, profiles, dispatch, kernel times: one after another, alone on the machine."""
    finish([start("h200_profile", WORK / "tables")], 80)
    finish([start("h200_dispatch", WORK / "tables" / "dispatch.csv")], 80)
    finish([start("h200_kernels", WORK / "tables")], 120)
    pack("tables", "tables/*")


def part_traces() -> None:
    """Memory only, so several workers share the GPU."""
    seconds = 110
    running = [
        start("h200_traces", WORK / "traces", worker, WORKERS, seconds) for worker in range(WORKERS)
    ]
    running += [start("h200_traces", WORK / "traces", 0, 1, seconds, "--expandable", **EXPANDABLE)]
    finish(running, seconds + 30)
    pack("traces_large", "traces/gpt2-large*")
    pack("traces_others", "traces/[!g]*")
    pack("traces_gemma", "traces/gemma*")


def part_rows() -> None:
    """The held-out rows, then ten of them again with expandable segments."""
    left = BEGAN + TOTAL - 15 - time.time()
    finish(
        [start("h200_loop", WORK / "held_out_default.csv", "default", "--seconds", left - 70)],
        left - 55,
    )
    finish(
        [
            start(
                "h200_loop",
                WORK / "held_out_expandable.csv",
                "expandable",
                "--seconds",
                60,
                **EXPANDABLE,
            )
        ],
        75,
    )
    pack("rows", "held_out_*.csv")


def main() -> None:
    """The named parts, or all."""
    OUT.mkdir(parents=True, exist_ok=True)
    (WORK / "tables").mkdir(parents=True, exist_ok=True)
    parts = {"traces": part_traces, "kernels": part_kernels, "rows": part_rows}
    for name, part in parts.items():
        if name in sys.argv or not any(p in sys.argv for p in parts):
            part()
            print(f"{name} done at {time.time() - BEGAN:.0f} s", flush=True)
            pack("logs", "*.log")
    for log in sorted(WORK.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text()[-700:]}")


if __name__ == "__main__":
    main()
