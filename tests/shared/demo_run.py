"""Runs of the demo, and what they leave."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from sftplan.cli.main import run as command

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS = ("--epochs", "2")  # 20 steps of 2 accumulated passes of packed rows
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SAME = ("loss", "grad_norm", "learning_rate", "tokens", "response_tokens", "tokens_total")


def demo(out: Path, *options: str) -> int:
    """Run the demo quietly in this process."""
    return command(["launch", "--demo", "--out", str(out), "-q", *EPOCHS, *options])


def lines(out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out: Path) -> list[tuple[Any, ...]]:
    """Everything of each step that does not depend on the clock."""
    return [tuple(line[key] for key in ("step", *SAME)) for line in lines(out)]


def status(out: Path) -> dict[str, Any]:
    """run.json."""
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found
