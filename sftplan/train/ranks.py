"""One process per GPU of this machine: started, told of signals, and gone when we are."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from sftplan.errors import ExitCode, TrainingFailedError
from sftplan.train.__main__ import SUMMARY
from sftplan.train.interrupt import SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    Processes = list[subprocess.Popen[bytes]]

LOGS = "logs"
STDERR = 2  # POSIX: the descriptor of standard error
PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 10.0  # for the others, once a rank has failed: they may be waiting for it for ever
POLL_S = 0.05


def run_ranks(out: Path, ranks: int) -> dict[str, Any]:
    """Run the job in `out`; rank 0 speaks and leaves the summary, the others write logs.

    Raises:
        KeyboardInterrupt: After a signal; the ranks have agreed, saved and ended.
        TrainingFailedError: A rank failed.
    """
    summary = out / SUMMARY
    summary.unlink(missing_ok=True)
    (out / LOGS).mkdir(exist_ok=True)
    with ExitStack() as stack:
        processes = _start(out, ranks, stack)
        with _handed_on(processes):
            failed = _wait(processes)
    if failed:
        rank = min(failed)
        raise _failure(out, rank, failed[rank])
    if any(process.returncode for process in processes):
        raise KeyboardInterrupt
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return found


def _start(out: Path, ranks: int, stack: ExitStack) -> Processes:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: Processes = []
    for rank in range(ranks):
        log = None
        if rank:
            log = stack.enter_context((out / LOGS / f"rank-{rank}.log").open("wb"))
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "SFTPLAN_RANKS": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "sftplan.train", str(out.resolve())],
            env=os.environ | {name: str(value) for name, value in place.items()},
            stdout=log or STDERR,  # ours is for the result
            stderr=log,
            preexec_fn=_end_with_parent,
            start_new_session=True,  # Ctrl-C comes through us, once
        )
        processes.append(process)
        stack.callback(_end, process)
    return processes


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that a process of ours is gone, whatever happened here."""
    if process.poll() is None:
        process.kill()
        process.wait()


def _wait(processes: Processes) -> dict[int, int]:
    """Until all have ended; after one has failed the others get a grace period.

    Ranks that failed by themselves, not those that were ended after them, and with which code.
    """
    deadline = float("inf")
    while None in (codes := [process.poll() for process in processes]):
        if deadline == float("inf") and any(codes):
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in processes:
                _end(process)
            break
        time.sleep(POLL_S)
    well = (0, None, ExitCode.INTERRUPTED)
    return {rank: code for rank, code in enumerate(codes) if code is not None and code not in well}


@contextmanager
def _handed_on(processes: Processes) -> Iterator[None]:
    """Signals to us become a SIGTERM to each rank: they agree on the step to stop after."""

    def hand_on(_: int, __: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _failure(out: Path, rank: int, code: int) -> TrainingFailedError:
    """Rank, cause and log."""
    cause = f"signal {-code}" if code < 0 else f"code {code}"
    where = "its message is above" if rank == 0 else f"its log is {out / LOGS / f'rank-{rank}.log'}"
    message = f"rank {rank} ended with {cause}; {where}"
    return TrainingFailedError(message, "--resume goes on from the last complete checkpoint")


def _end_with_parent() -> None:
    """Where the system can: a launcher that is killed leaves no process on the GPUs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
