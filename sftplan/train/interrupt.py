"""Ctrl-C and SIGTERM: the step ends, a checkpoint is written, then the run stops."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Asked:
    """Whether a signal has come."""

    by: str | None = None


class InterruptedRunError(KeyboardInterrupt):
    """The run was asked to stop and has saved; its exit code is 130."""


@contextmanager
def deferred() -> Iterator[Asked]:
    """Take note of the first signal; the second one acts as it always does."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handler(number: int, _: FrameType | None) -> None:
        asked.by = signal.Signals(number).name
        for each, old in before.items():
            signal.signal(each, old)

    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)
