"""CPU seconds of the commands against those of importing their libraries.

python tests/bench/plan_cpu.py [path to sftplan]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

REPEATS = 5
SFTPLAN = sys.argv[1] if len(sys.argv) > 1 else str(Path(sys.executable).parent / "sftplan")
CASES = {
    "plan gpt2-large": "plan --model gpt2-large --seq 1024 --hardware h200-sxm --no-out",
    "compare --all": "compare --model gpt2-large --seq 1024 --all",
    "plan 70 B on 64 GPUs": "plan --model llama-2-70b --seq 4096 --hardware h200-sxm --gpus 8 --nodes 8 --no-out",
}


def cpu_s(command: list[str]) -> float:
    """User and system time of a command, the median of some runs."""
    times = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command, check=False, capture_output=True, env=dict(os.environ, NO_COLOR="1")
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(times)


def main() -> None:
    """Print a line per command."""
    base = cpu_s([sys.executable, "-c", "import click, rich, pydantic"])
    print(f"{'import click, rich, pydantic':<30}{base:8.3f} s")
    for name, arguments in CASES.items():
        seconds = cpu_s([SFTPLAN, *arguments.split()])
        print(f"{name:<30}{seconds:8.3f} s{seconds - base:+8.3f} s")


if __name__ == "__main__":
    main()
