"""What can go wrong, and the exit code of each.

SftplanError
├── UsageError            2   an option or a file that cannot be used
├── InfeasibleError       3   nothing in the search space fits
├── DriftError            4   the plan does not describe this machine, model or version
├── MispredictedError     5   the dry run missed the prediction or ran out of memory
├── NotReadyError         6   no GPU, no driver or an extra that is not installed
└── TrainingFailedError   7   a rank died

Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import json
    from collections.abc import Iterable


class ExitCode(IntEnum):
    """Exit codes of every command; people script against them."""

    OK = 0
    BUG = 1
    USAGE = 2
    INFEASIBLE = 3
    DRIFT = 4
    MISPREDICTED = 5
    NOT_READY = 6
    TRAINING_FAILED = 7
    INTERRUPTED = 130


class SftplanError(Exception):
    """An expected failure: one message (what, where, how much) and, if there is one, what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SftplanError):
    """An option or an input file that cannot be used; names file, line and field where known."""

    exit_code = ExitCode.USAGE


class InfeasibleError(SftplanError):
    """Nothing in the search space fits."""

    exit_code = ExitCode.INFEASIBLE


class DriftError(SftplanError):
    """The plan does not describe this machine, model or version."""

    exit_code = ExitCode.DRIFT


class MispredictedError(SftplanError):
    """The dry run missed the prediction or ran out of memory."""

    exit_code = ExitCode.MISPREDICTED


class NotReadyError(SftplanError):
    """No GPU, no driver or an extra that is not installed."""

    exit_code = ExitCode.NOT_READY


class TrainingFailedError(SftplanError):
    """A rank died; the message names rank, cause and log."""

    exit_code = ExitCode.TRAINING_FAILED


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the closest known words, or None.

    >>> did_you_mean("gpt2-larg", ["gpt2", "gpt2-large", "opt-125m"])
    'did you mean gpt2-large?'
    """
    close = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.6)
    if (close and word.lower() in close[0]) or len(close) == 1:
        return f"did you mean {close[0]}?"
    return f"did you mean {', '.join(close[:-1])} or {close[-1]}?" if close else None


def json_words(error: json.JSONDecodeError) -> str:
    """What is broken in a JSON text, without the place that json's own message leads on to.

    >>> import json
    >>> json_words(json.JSONDecodeError("Unterminated string starting at", '{"a": "b', 6))
    'Unterminated string'
    """
    return error.msg.removesuffix(" at").removesuffix(" starting")
