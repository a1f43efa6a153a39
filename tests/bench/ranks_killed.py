"""Kill one rank of a run: `python ranks_killed.py FOLDER --model gpt2 --data FILE [--tokenizer DIR] [--zero 0,2]`.

For each stage two runs at once, the same but that in one of them the last rank is killed between two
checkpoints: how long until all have stopped, with which exit code; then it goes on, and its losses are
held against the other's. Further options go to `launch` as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

STEPS, EVERY, KILLED_AFTER = 150, 40, 50
LIMIT_S = 100.0


def begun(args: argparse.Namespace, zero: int, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    command = [
        sys.executable, "-m", "sftplan", "launch", "--model", args.model, "--seq", str(args.seq), "--data", args.data,
        "--gpus", str(args.gpus), "--zero", str(zero), "--offload", "none", "--global-batch", str(8 * args.gpus),
        "--out", str(out), "--max-steps", str(STEPS), "--save-every", str(EVERY), "--epochs", "40",
        "--random-weights", "--no-verify", "-q", *(["--tokenizer", args.tokenizer] if args.tokenizer else []),
        *args.more, *more,
    ]  # fmt: skip
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


def losses(out: Path) -> list[tuple[int, float]]:
    """Step and loss, as written so far."""
    file = out / "metrics.jsonl"
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def last_rank(process: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of a rank below ours."""
    found = [
        child for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank) and "python" in child.name()
    ]  # fmt: skip
    return min(found, key=lambda child: child.create_time())


def killed(args: argparse.Namespace, zero: int) -> dict[str, Any]:
    """One stage."""
    whole, broken = args.out / f"whole-{zero}", args.out / f"killed-{zero}"
    one, other = begun(args, zero, whole), begun(args, zero, broken)
    start = time.monotonic()
    while len(losses(broken)) < KILLED_AFTER:
        if other.poll() is not None or time.monotonic() > start + LIMIT_S:
            other.kill()
            return {"zero": zero, "status": f"ended with {other.returncode} before it was killed"}
        time.sleep(0.01)
    last_rank(other, args.gpus - 1).kill()
    at = time.monotonic()
    code = other.wait(timeout=LIMIT_S)
    stopped_s = time.monotonic() - at
    seen = len(losses(broken))
    again = begun(args, zero, broken, "--resume").wait(timeout=LIMIT_S)
    one.wait(timeout=LIMIT_S)
    pairs = list(zip(losses(whole), losses(broken), strict=False))
    apart = [abs(a[1] - b[1]) for a, b in pairs]
    return {
        "zero": zero, "gpus": args.gpus, "exit_code": code, "stopped_s": round(stopped_s, 2), "steps_when_killed": seen,
        "resumed_exit_code": again, "steps": len(losses(broken)), "steps_whole": len(losses(whole)),
        "same_steps": all(a[0] == b[0] for a, b in pairs),
        "max_loss_difference": max(apart, default=None),
        "before_the_checkpoint": max(apart[:EVERY], default=None),  # of two runs that nothing has happened to
    }  # fmt: skip


def main() -> None:
    """All stages at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--zero", default="0,2")
    args, args.more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stages = [int(zero) for zero in args.zero.split(",")]
    with ThreadPoolExecutor() as pool:
        for row in pool.map(lambda zero: killed(args, zero), stages):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
