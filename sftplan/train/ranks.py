"""One process per GPU of this machine: started, told of signals, and gone when we are.

So are those of other machines of the run: theirs end when one of ours has failed, and ours with theirs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from sftplan.detect.host import num_cpus
from sftplan.errors import ExitCode, TrainingFailedError
from sftplan.train.__main__ import SUMMARY
from sftplan.train.interrupt import SIGNALS
from sftplan.train.nodes import Node, Others, meeting_port

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
RESUME = "--resume goes on from the last complete checkpoint"


def run_ranks(out: Path, ranks: int, node: Node | None = None) -> dict[str, Any]:
    """Run the job in `out`, with so many ranks here; the first of all speaks and leaves the summary.

    The others write logs. On a machine that is not the first one the summary is empty.

    Raises:
        KeyboardInterrupt: After a signal; the ranks have agreed, saved and ended.
        TrainingFailedError: A rank failed, here or on another machine.
        UsageError: The port is in use.
    """
    here = node or Node()
    summary = out / SUMMARY
    if here.is_first:
        summary.unlink(missing_ok=True)
    (out / LOGS).mkdir(exist_ok=True)
    port = meeting_port(here)
    others = Others(here)
    well = False
    try:
        with ExitStack() as stack:
            processes = _start(out, ranks, here, port, stack)
            with _handed_on(processes):
                failed = _wait(processes, others)
        _raise_failure(out, here.number * ranks, failed, others)
        well = True
    finally:
        others.end(well=well)
    if any(process.returncode for process in processes):
        raise KeyboardInterrupt
    found: dict[str, Any] = {}
    if here.is_first:
        found = json.loads(summary.read_text(encoding="utf-8"))
    return found


def place_of_rank(local: int, ranks: int, node: Node, port: int) -> dict[str, str]:
    """What a process has to know of its place; `ranks` are those of one machine.

    Each takes its share of the processors, as all of them are busy at the same time: with threads
    for all processors each, AdamW on the host would be slower than one rank alone.
    """
    place = {
        "RANK": node.number * ranks + local, "LOCAL_RANK": local,
        "WORLD_SIZE": ranks * len(node.hosts), "SFTPLAN_RANKS": ranks,
        "MASTER_ADDR": node.hosts[0], "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, num_cpus() // ranks)),
    }  # fmt: skip
    return {name: str(value) for name, value in place.items()}


def _start(out: Path, ranks: int, node: Node, port: int, stack: ExitStack) -> Processes:
    processes: Processes = []
    for local in range(ranks):
        place = place_of_rank(local, ranks, node, port)
        log = None
        if place["RANK"] != "0":
            path = out / LOGS / f"rank-{place['RANK']}.log"
            log = stack.enter_context(path.open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "sftplan.train", str(out.resolve())],
            env=os.environ | place,
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


def _wait(processes: Processes, others: Others) -> dict[int, int]:
    """Until all have ended; after one has failed, here or elsewhere, the others get a grace period.

    Ranks that failed by themselves, not those that were ended after them, and with which code.
    """
    deadline = float("inf")
    while None in (codes := [process.poll() for process in processes]):
        if deadline == float("inf") and (any(codes) or others.lost is not None):
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


def _raise_failure(out: Path, first: int, failed: dict[int, int], others: Others) -> None:
    """Of ranks that failed, of which the first here is number `first`, the one that is the cause."""
    own = {rank: code for rank, code in failed.items() if not _is_consequence(code)} or failed
    if own is failed and failed:
        others.wait_for_loss(GRACE_S)
    if others.lost is not None and own is failed:
        message = f"the ranks of {others.lost} are gone, and these with them"
        raise TrainingFailedError(message, f"{RESUME}; what happened is said there")
    if own:
        rank = min(own)
        raise _failure(out, first + rank, own[rank])


def _is_consequence(code: int) -> bool:
    """Whether a rank may have ended so because it lost another one: with a traceback.

    Ranks that were killed, or said what was wrong, are causes.
    """
    return code == ExitCode.BUG


def _failure(out: Path, rank: int, code: int) -> TrainingFailedError:
    """Rank, cause and log."""
    cause = f"signal {-code}" if code < 0 else f"code {code}"
    where = "its message is above" if rank == 0 else f"its log is {out / LOGS / f'rank-{rank}.log'}"
    message = f"rank {rank} ended with {cause}; {where}"
    return TrainingFailedError(message, RESUME)


def _end_with_parent() -> None:
    """Where the system can: a launcher that is killed leaves no process on the GPUs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
