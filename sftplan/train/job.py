"""What the processes of a run are started with: the plan, the data and the settings, as files."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError
from sftplan.plan.file import read_plan, write_plan, write_text
from sftplan.train.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

PLAN, JOB, RUN = "plan.json", "job.json", "run.json"
CHECKPOINTS, FINAL = "checkpoints", "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    plan: Plan
    data: str
    out: Path
    settings: Settings
    resume: bool = False
    quiet: bool = False


def trains_on_prompt(plan: Plan, asked: bool | None) -> bool:
    """Whether every token counts: as the plan has it, which knows how many positions the head sees.

    Raises:
        UsageError: More is asked for than the plan has counted.
    """
    planned = plan.inputs.workload
    if asked and not planned.train_on_prompt and planned.lengths is not None:
        message = "--train-on-prompt: the plan counts the responses alone"
        raise UsageError(message, "`sftplan plan --train-on-prompt` counts every token")
    return planned.train_on_prompt if asked is None else asked


def write_job(job: Job) -> None:
    """Write plan.json and job.json into the run's folder."""
    make_folder(job.out)
    write_plan(job.plan, job.out / PLAN)
    fields: dict[str, Any] = {
        "data": job.data,
        "settings": dataclasses.asdict(job.settings),
        "resume": job.resume,
        "quiet": job.quiet,
    }
    write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", job.out / JOB)


def read_job(out: Path) -> Job:
    """The run whose files `write_job` wrote."""
    try:
        fields = json.loads((out / JOB).read_text(encoding="utf-8"))
        settings = Settings(**fields.pop("settings"))
        return Job(plan=read_plan(out / PLAN), out=out, settings=settings, **fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{out / JOB}: {error}"
        raise UsageError(message, "`sftplan launch` writes it") from None


def make_folder(out: Path) -> None:
    """Make the run's folder, unless it is there.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--out {out} cannot be made: {error.strerror or error}"
        raise UsageError(message) from None


def refuse_used_folder(out: Path, *, resume: bool) -> None:
    """A folder holds one run: another one needs another folder. It has to be one that can be written."""
    if out.exists() and not out.is_dir():
        message = f"--out {out} is not a folder"
        raise UsageError(message)
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        message = f"--out {out} cannot be written: no permission for {above}"
        raise UsageError(message)
    if not resume and any((out / name).exists() for name in (CHECKPOINTS, FINAL, "metrics.jsonl")):
        message = f"--out {out} holds a run already"
        raise UsageError(message, "--resume goes on with it, another folder starts anew")
