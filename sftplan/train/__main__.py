"""`python -m sftplan.train DIR`: one process of the run whose job lies in DIR."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sftplan.errors import ExitCode, SftplanError
from sftplan.train.job import read_job
from sftplan.train.launch import set_allocator

SUMMARY = "summary.json"


def main(out: Path) -> None:
    """Run the job; rank 0 leaves its summary for the process that started the ranks."""
    job = read_job(out)
    set_allocator(job.plan)
    from sftplan.train.metrics import finite
    from sftplan.train.session import place_of_process, run_job

    summary = run_job(job)
    if place_of_process().rank == 0:
        (out / SUMMARY).write_text(json.dumps(finite(summary)), encoding="utf-8")


def guarded(out: Path) -> int:
    """The exit code of `main`; what went wrong is on standard error."""
    try:
        main(out)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except SftplanError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(guarded(Path(sys.argv[-1])))
