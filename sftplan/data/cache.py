"""Tokenised examples kept between runs, by the content of the data and of the tokenizer.

One file per data set: a line of JSON (sizes, places, notes), then the arrays, then the SHA-256 of
all of it. A file that is cut, changed or of another version is not used but made again. Files
appear by renaming, so several processes may write the same one at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan import __version__
from sftplan.data.conversation import Place, Problem
from sftplan.data.mask import Example

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.tokenizer import BpeTokenizer

LAYOUT = 1  # of the file; raise it with any change of template, mask or file
_DIGEST_BYTES = 32
_NO_LINE = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tokenised:
    """What tokenising a data set gave, before it is cut to a sequence length."""

    examples: tuple[Example, ...]
    skipped: tuple[Problem, ...]
    notes: tuple[str, ...]
    num_read: int  # examples of the files, the skipped ones included
    template: str


def default_cache_folder() -> Path:
    """Where the user's caches lie: $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "sftplan" / "data"


def cache_key(files: Sequence[Path], tokenizer: BpeTokenizer) -> str:
    """Changes with any byte of the data, its names, the tokenizer, and our own version."""
    digest = hashlib.sha256(f"{LAYOUT} {__version__} {sys.byteorder}\n".encode())
    digest.update(tokenizer.fingerprint.encode())
    for file in files:
        digest.update(f"\n{file}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def save(folder: Path, key: str, tokenised: Tokenised) -> None:
    """Write an entry; a disk that is full or read-only only costs the cache."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                body = _body(tokenised)
                stream.write(body)
                stream.write(hashlib.sha256(body).digest())
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(_entry(folder, key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def load(folder: Path, key: str) -> Tokenised | None:
    """The entry, or None where there is none that is whole."""
    try:
        data = _entry(folder, key).read_bytes()
    except OSError:
        return None
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    return _tokenised(body)


def _entry(folder: Path, key: str) -> Path:
    return folder / f"{key}.tokens"


def _body(tokenised: Tokenised) -> bytes:
    examples = tokenised.examples
    names = list(dict.fromkeys(example.place.file for example in examples))
    number = {name: index for index, name in enumerate(names)}
    header = {
        "files": names,
        "num_examples": len(examples),
        "skipped": [dataclasses.asdict(problem) for problem in tokenised.skipped],
        "notes": tokenised.notes,
        "num_read": tokenised.num_read,
        "template": tokenised.template,
    }
    line = [_NO_LINE if e.place.line is None else e.place.line for e in examples]
    columns = (
        [len(example) for example in examples],
        [number[example.place.file] for example in examples],
        [example.place.row for example in examples],
        line,
    )
    parts = [json.dumps(header).encode() + b"\n"]
    parts += [array("q", column).tobytes() for column in columns]
    parts += [example.input_ids.tobytes() for example in examples]
    parts += [example.trained for example in examples]
    return b"".join(parts)


def _tokenised(body: bytes) -> Tokenised:
    end = body.index(b"\n") + 1
    header: dict[str, Any] = json.loads(body[:end])
    count = header["num_examples"]
    columns: list[array[int]] = []
    for _ in range(4):
        column = array("q")
        column.frombytes(body[end : end + 8 * count])
        end += 8 * count
        columns.append(column)
    view = memoryview(body)
    ids_at, trained_at = end, end + 4 * sum(columns[0])
    examples: list[Example] = []
    for length, file, row, line in zip(*columns, strict=True):
        ids = array("i")
        ids.frombytes(view[ids_at : ids_at + 4 * length])
        trained = bytes(view[trained_at : trained_at + length])
        place = Place(file=header["files"][file], row=row, line=None if line == _NO_LINE else line)
        examples.append(Example(input_ids=ids, trained=trained, place=place))
        ids_at += 4 * length
        trained_at += length
    skipped = [Problem(**{**p, "place": Place(**p["place"])}) for p in header["skipped"]]
    return Tokenised(
        examples=tuple(examples),
        skipped=tuple(skipped),
        notes=tuple(header["notes"]),
        num_read=header["num_read"],
        template=header["template"],
    )
