"""One process per GPU, through torchrun: started, told of signals, and gone when we are."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from sftplan.errors import TrainingFailedError
from sftplan.train.__main__ import SUMMARY
from sftplan.train.interrupt import SIGNALS

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_ranks(out: Path, ranks: int) -> dict[str, Any]:
    """Run the job in `out`; rank 0 leaves the summary in a file.

    Raises:
        KeyboardInterrupt: After a signal; the ranks have agreed, saved and ended.
        TrainingFailedError: A rank failed; its message is on standard error.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", "-m", "sftplan.train", str(out.resolve()),
    ]  # fmt: skip
    summary = out / SUMMARY
    summary.unlink(missing_ok=True)
    code, signalled = _wait(command)
    if signalled:
        raise KeyboardInterrupt
    if code or not summary.is_file():
        message = f"a process of the run ended with code {code}; its message is above"
        raise TrainingFailedError(message, "--resume goes on from the last complete checkpoint")
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return found


def _wait(command: list[str]) -> tuple[int, bool]:
    """The exit code, and whether a signal was handed on."""
    process = subprocess.Popen(command, preexec_fn=_end_with_parent, start_new_session=True)
    handed_on: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        handed_on.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        return process.wait(), bool(handed_on)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end_with_parent() -> None:
    """Where the system can: a launcher that is killed leaves no process on the GPUs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
