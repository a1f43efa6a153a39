"""Tokenised examples kept between runs, by the content of the data and of the tokenizer.

One file per data set, as `store` lays it out. A file that is cut, changed or of another version is
not used but made again. Files appear by renaming, so several processes may write the same one at
once, and what is mapped into memory stays readable when its name goes to another file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan import __version__
from sftplan.data.conversation import Place, Problem
from sftplan.data.store import Writer, opened
from sftplan.facts.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sftplan.data.read import Source
    from sftplan.data.store import Stored
    from sftplan.data.tokenizer import BpeTokenizer

    Fill = Callable[[Writer], dict[str, Any]]

LAYOUT = 2  # of the file; raise it with any change of template, mask or file


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tokenised:
    """What tokenising a data set gave, before it is cut to a sequence length."""

    examples: Stored
    largest_id: int
    skipped: tuple[Problem, ...]
    notes: tuple[str, ...]
    num_read: int  # examples of the files, the skipped ones included
    template: str


class _FullError(Exception):
    """The cache cannot be written."""


def default_cache_folder() -> Path:
    """Where tokenised data lies."""
    return cache_folder() / "data"


def cache_key(sources: Sequence[Source], tokenizer: BpeTokenizer) -> str:
    """Changes with any byte of the data, its names, the tokenizer, and our own version."""
    digest = hashlib.sha256(f"{LAYOUT} {__version__} {sys.byteorder}\n".encode())
    digest.update(tokenizer.fingerprint.encode())
    for source in sources:
        digest.update(f"\n{source.name}\n".encode("utf-8", "surrogateescape"))
        digest.update(source.digest())
    return digest.hexdigest()


def header_of(
    *, skipped: Sequence[Problem], notes: Sequence[str], num_read: int, template: str
) -> dict[str, Any]:
    """What an entry says beside its examples."""
    return {
        "skipped": [dataclasses.asdict(problem) for problem in skipped],
        "notes": list(notes),
        "num_read": num_read,
        "template": template,
    }


def in_memory(fill: Fill) -> Tokenised:
    """What `fill` writes, kept as bytes."""
    stream = io.BytesIO()
    writer = Writer(stream)
    writer.finish(fill(writer))
    found = _tokenised(stream.getbuffer())
    assert found is not None
    return found


def save(folder: Path, key: str, fill: Fill) -> Tokenised | None:
    """Let `fill` write an entry, then map it; None where the disk is full or cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    except OSError:
        return None
    try:
        with os.fdopen(handle, "wb") as raw:
            stream: Any = _Disk(raw)
            writer = Writer(stream)
            writer.finish(fill(writer))
            stream.sync()
        Path(name).chmod(0o400)  # cut short in place, it would take mapped pages from under a run
        Path(name).replace(_entry(folder, key))
    except (_FullError, OSError):
        Path(name).unlink(missing_ok=True)
        return None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return load(folder, key)


class _Disk:
    """A file whose failures are told from those of the data that is read."""

    def __init__(self, raw: io.BufferedWriter) -> None:
        self._raw = raw

    def write(self, data: bytes) -> None:
        with _told():
            self._raw.write(data)

    def sync(self) -> None:
        with _told():
            self._raw.flush()
            os.fsync(self._raw.fileno())


@contextlib.contextmanager
def _told() -> Any:
    try:
        yield
    except OSError as error:
        raise _FullError from error


def load(folder: Path, key: str) -> Tokenised | None:
    """The entry, mapped into memory, or None where there is none that is whole."""
    try:
        with _entry(folder, key).open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    return _tokenised(memoryview(mapped))


def _entry(folder: Path, key: str) -> Path:
    return folder / f"{key}.tokens"


def _tokenised(buffer: memoryview) -> Tokenised | None:
    found = opened(buffer)
    if found is None:
        return None
    examples, header = found
    skipped = [Problem(**{**p, "place": Place(**p["place"])}) for p in header["skipped"]]
    return Tokenised(
        examples=examples,
        largest_id=header["largest_id"],
        skipped=tuple(skipped),
        notes=tuple(header["notes"]),
        num_read=header["num_read"],
        template=header["template"],
    )
