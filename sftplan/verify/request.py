"""What the processes of a dry run are told, as a file: no more than they cannot find out themselves."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftplan.plan.file import read_plan, write_plan, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

PLAN, REQUEST = "plan.json", "request.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One dry run. `cap_bytes` is the most that PyTorch may reserve, None for all of the GPU.

    More rounds of steps are timed for up to `more_rounds_s` where they are uneven.
    """

    steps: int  # that are timed in a round
    more_rounds_s: float = 0.0
    data: str | None = None
    tokenizer: str | None = None
    skip_bad: int = 0
    cap_bytes: int | None = None
    snapshot: str | None = None
    timeline: bool = True
    cpu: bool = False


def write_request(plan: Plan, request: Request, folder: Path) -> None:
    """Write both files into the folder of a dry run."""
    write_plan(plan, folder / PLAN)
    write_text(json.dumps(dataclasses.asdict(request)) + "\n", folder / REQUEST)


def read_request(folder: Path) -> tuple[Plan, Request]:
    """What `write_request` wrote."""
    fields: dict[str, Any] = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    return read_plan(folder / PLAN), Request(**fields)


def result_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves what it measured."""
    return folder / f"result-{rank}.json"


def log_file(folder: Path, rank: int) -> Path:
    """What a rank wrote on its standard streams."""
    return folder / f"rank-{rank}.log"
