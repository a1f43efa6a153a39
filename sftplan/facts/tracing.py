"""Questions to a process that has PyTorch and transformers: planning itself never imports them.

The process starts with the first question and ends with this one: its standard input is a pipe. A
question and its answer are one line of JSON each. Answers are kept in the user's cache by everything
that they depend on: question, versions of the packages, version of the answer's form.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sftplan import __version__
from sftplan.errors import NotReadyError, UsageError
from sftplan.facts.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULE = "sftplan.verify.trace.serve"
PACKAGES = ("torch", "transformers")
LAYOUT = 1  # of the answers; raise it with any change of what is traced
LAST_LINES = 3  # of what a process said before it died, in the message


def require_packages(what: str) -> None:
    """Refuse where the training extra is not installed.

    Raises:
        NotReadyError: PyTorch or transformers is missing.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            message = f"{what}, which needs {name}, and that is not installed"
            raise NotReadyError(message, "`pip install 'sftplan[train]'`")


def ask(question: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a question, from the cache or from the process.

    Raises:
        UsageError: The model cannot be used.
        NotReadyError: It cannot be traced, or the process died.
    """
    text = json.dumps(question, sort_keys=True)
    return _answer(text)


@cache
def _answer(question: str) -> dict[str, Any]:
    file = _cached_file(question)
    found = _read(file)
    if found is None:
        found = _process().ask(question)
        if "error" not in found:
            _keep(file, found)
    if "error" in found:
        kind = UsageError if found["usage"] else NotReadyError
        raise kind(found["error"], found["hint"])
    return found


def _cached_file(question: str) -> Path:
    versions = [__version__, str(LAYOUT), *(metadata.version(name) for name in PACKAGES)]
    digest = hashlib.sha256("\n".join([*versions, question]).encode()).hexdigest()
    return cache_folder() / "traces" / f"{digest}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """A kept answer; one that is cut or unreadable counts as none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _keep(file: Path, answer: Mapping[str, Any]) -> None:
    """By renaming, so that nobody reads half an answer; a cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(answer, stream)
            Path(name).replace(file)
        except OSError:
            Path(name).unlink(missing_ok=True)


class _Process:
    """One that answers, in a session of its own: Ctrl-C is ours, and the pipe's end is its end."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._child = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, encoding="utf-8", start_new_session=True,
        )  # fmt: skip

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to one line."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            _stream(self._child.stdin).write(question + "\n")
            _stream(self._child.stdin).flush()
            line = _stream(self._child.stdout).readline()
        if not line:
            _process.cache_clear()
            self._child.wait()
            self._log.seek(0)
            said = self._log.read().decode("utf-8", "replace").splitlines()[-LAST_LINES:]
            self.end()
            message = "the process that traces the model ended:\n" + "\n".join(said)
            raise NotReadyError(message, "`sftplan env` describes this machine for a report")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """Whatever it does, it is gone."""
        self._child.kill()
        self._child.wait()
        self._log.close()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):
                _stream(pipe).close()


def _stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@cache
def _process() -> _Process:
    process = _Process()
    atexit.register(process.end)
    return process
