"""`python -m sftplan.verify.child DIR`: one process of a dry run, gone with the one that started it.

It leaves `result-RANK.json` in DIR, also where memory ran out; its standard input is a pipe that
nobody writes to, and that ends when the other process does, however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from sftplan.errors import ExitCode, SftplanError
from sftplan.plan.file import write_text
from sftplan.train.launch import set_allocator
from sftplan.verify.request import read_request, result_file


def main(folder: Path) -> int:
    """The exit code; what is expected to go wrong is in the result."""
    end_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    try:
        plan, request = read_request(folder)
        set_allocator(plan)
        from sftplan.verify.run import dry_run

        found: dict[str, Any] = dry_run(plan, request)
        code = ExitCode.MISPREDICTED if "out_of_memory" in found else ExitCode.OK
    except SftplanError as error:
        code = error.exit_code
        found = {"error": error.message, "hint": error.hint, "exit_code": int(code)}
    text = json.dumps(found, allow_nan=False) + "\n"
    write_text(text, result_file(folder, rank))
    return code


def end_with_parent() -> None:
    """No process stays on a GPU whose measuring nobody waits for any more, nor what it has started.

    The kernel's own death signal would reach this process alone, and before it can pass it on.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)  # with what compiles for us

    threading.Thread(target=watch, daemon=True, name="sftplan-parent").start()


if __name__ == "__main__":
    sys.stdout.flush()
    code = main(Path(sys.argv[-1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the watching thread and libraries' own would hold an ordinary exit up
