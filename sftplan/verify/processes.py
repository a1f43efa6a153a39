"""Fresh processes for a dry run, one per GPU: started, waited for, and gone whatever happens here.

One that runs out of memory leaves its numbers and ends; the others, which may be waiting for it in a
collective for ever, are then ended too: that is how the ranks agree on an out-of-memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from sftplan.errors import (
    DriftError,
    MispredictedError,
    NotReadyError,
    SftplanError,
    TrainingFailedError,
    UsageError,
)
from sftplan.train.nodes import Node, meeting_port
from sftplan.train.ranks import place_of_rank
from sftplan.verify.request import log_file, result_file

if TYPE_CHECKING:
    from pathlib import Path

    Processes = list[subprocess.Popen[bytes]]

GRACE_S = 5.0  # for the others, once a rank has ended early
POLL_S = 0.05
LOG_LINES = 12  # of a process that died, in the message
STOOD_LINES = 4  # of where one stood that hangs: its innermost calls
STACK = "(most recent call first):\n"  # what faulthandler writes above each thread's
ERRORS: dict[int, type[SftplanError]] = {
    int(kind.exit_code): kind
    for kind in (UsageError, DriftError, NotReadyError, MispredictedError, TrainingFailedError)
}


def run_processes(
    folder: Path, ranks: int, *, module: str = "sftplan.verify.child", timeout_s: float
) -> list[dict[str, Any]]:
    """What each rank left; of ranks that were ended because another one failed, nothing.

    Raises:
        SftplanError: A rank could not begin, died, or took longer than `timeout_s`.
        KeyboardInterrupt: After Ctrl-C, with every process gone.
    """
    processes: Processes = []
    try:
        port = meeting_port(Node()) if ranks > 1 else 0
        for rank in range(ranks):
            processes.append(_start(folder, rank, ranks, port, module))
        failed = _wait(processes, timeout_s)
        if failed is None:
            _raise_hanging(folder, processes, timeout_s)
    finally:
        for process in processes:
            _end(process)
    results = [_result(folder, rank) for rank in range(ranks)]
    _raise_errors(folder, failed, results)
    return [found for found in results if found is not None]


def _start(folder: Path, rank: int, ranks: int, port: int, module: str) -> subprocess.Popen[bytes]:
    """One rank in a session of its own, so that all that it starts can be ended with it."""
    place = place_of_rank(rank, ranks, Node(), port) if ranks > 1 else {}
    with log_file(folder, rank).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder.resolve())],
            env=os.environ | place | {"PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.PIPE,  # ends when we do
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait(processes: Processes, timeout_s: float) -> dict[int, int] | None:
    """Until all have ended, or one has failed and the others have had a grace period.

    Ranks that ended by themselves with another code than 0, and that code; None when time is up.
    """
    deadline = time.monotonic() + timeout_s
    failed: dict[int, int] = {}
    while None in (codes := [process.poll() for process in processes]):
        if not failed and any(codes):
            failed = {rank: code for rank, code in enumerate(codes) if code}
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            return failed or None
        time.sleep(POLL_S)
    return failed or {rank: code for rank, code in enumerate(codes) if code}


def _raise_hanging(folder: Path, processes: Processes, timeout_s: float) -> NoReturn:
    """Time is up: whoever still runs writes down where it stands (SIGABRT, faulthandler) and ends."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    stood = [f"rank {rank}:\n{_stood(folder, rank)}" for rank in range(len(processes))]
    message = f"the dry run has not ended in {timeout_s:,.0f} s; it stood at\n" + "\n".join(stood)
    raise TrainingFailedError(message, "fewer `--steps`, or a smaller `--accumulation`")


def _stood(folder: Path, rank: int) -> str:
    """The innermost calls of the main thread, which faulthandler writes last."""
    text = log_file(folder, rank).read_text(encoding="utf-8", errors="replace")
    lines = text.rpartition(STACK)[2].splitlines() if STACK in text else ["  it does not say"]
    return "\n".join(lines[:STOOD_LINES])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that a process and what it started are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _result(folder: Path, rank: int) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(result_file(folder, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _raise_errors(
    folder: Path, failed: dict[int, int], results: list[dict[str, Any] | None]
) -> None:
    """The first error that a rank left, or that one died without a word."""
    for found in results:
        if found is not None and "error" in found:
            kind = ERRORS.get(found["exit_code"], TrainingFailedError)
            raise kind(found["error"], found["hint"])
    for rank, code in failed.items():
        if results[rank] is None:
            cause = f"signal {-code}" if code < 0 else f"code {code}"
            if code == -signal.SIGKILL:
                cause += ", as the system ends a process when the host runs out of memory"
            message = f"rank {rank} of the dry run ended with {cause}:\n{_tail(folder, rank)}"
            raise TrainingFailedError(message, "`sftplan env` describes this machine for a report")


def _tail(folder: Path, rank: int) -> str:
    text = log_file(folder, rank).read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-LOG_LINES:]) or "it wrote nothing"
