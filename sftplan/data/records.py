"""Files to records: one JSON value per example, or what is wrong with it, and its place.

JSON is read strictly: no NaN or infinity, no key twice, UTF-8 only (a byte order mark is accepted).
A record that is broken by itself comes out as BadExampleError, and reading goes on where the
layout allows it (the next line, the next element); a file that cannot go on raises UsageError.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from typing import TYPE_CHECKING, TypeAlias

from sftplan.data.conversation import BadExampleError, Place
from sftplan.errors import NotReadyError, UsageError, json_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Record: TypeAlias = "tuple[Place, object | BadExampleError]"

_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
SUFFIXES = _JSON_SUFFIXES | {".csv", ".tsv", ".parquet"}
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\xff\xfe\0\0": ("is UTF-32, expected UTF-8", "save it as UTF-8"),
    b"\0\0\xfe\xff": ("is UTF-32, expected UTF-8", "save it as UTF-8"),
    b"\xff\xfe": ("is UTF-16, expected UTF-8", "save it as UTF-8"),
    b"\xfe\xff": ("is UTF-16, expected UTF-8", "save it as UTF-8"),
    b"\x1f\x8b": ("is compressed with gzip", "unpack it with gunzip"),
    b"PK\x03\x04": ("is a zip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "unpack it with unzstd"),
    b"version https://git-lfs": ("is a Git LFS pointer, not the data", "run `git lfs pull`"),
    b"<": ("looks like a web page, not like data", "download the file itself"),
}


def records_of(file: Path) -> Iterator[Record]:
    """The records of one file, by its suffix, else by its first bytes."""
    try:
        with file.open("rb") as stream:
            head = stream.read(1024)
    except OSError as error:
        message = f"cannot read {file}: {error.strerror}"
        raise UsageError(message) from None
    if not head:
        message = f"{file} is empty"
        raise UsageError(message)
    suffix = file.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        yield from _parquet(file)
        return
    for magic, (reason, hint) in _FOREIGN.items():
        if head.startswith(magic):
            message = f"{file} {reason}"
            raise UsageError(message, hint)
    first = head.removeprefix(_BOM).lstrip()[:1]
    if suffix in (".csv", ".tsv"):
        yield from _csv(file, "\t" if suffix == ".tsv" else ",")
    elif first == b"[":
        yield from _json_array(file)
    elif first == b"{" or suffix in _JSON_SUFFIXES:
        yield from _json_lines(file)
    else:
        message = f"{file} is no format that is known"
        raise UsageError(message, f"files that are read: {', '.join(sorted(SUFFIXES))}")


class _StrictDecoder:
    """A JSON decoder that notes what the standard one lets pass."""

    def __init__(self) -> None:
        self._issues: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._issues.append(f"has the key {twice[:40]!r} twice")
        return value

    def _constant(self, name: str) -> None:
        self._issues.append(f"holds {name}, which is no JSON")

    def _float(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self._issues.append("holds a number that is too large")
        return value

    def _strict(self, value: object) -> object:
        if not self._issues:
            return value
        first = self._issues[0]
        self._issues.clear()
        return BadExampleError(field="example", reason=first)

    def line(self, text: str) -> object:
        """The value of one line, or what is wrong with it."""
        self._issues.clear()
        try:
            return self._strict(self._decoder.decode(text.rstrip("\r\n")))
        except json.JSONDecodeError as error:
            hint = "each line of a .jsonl file is one complete object"
            reason = f"broken JSON in column {error.colno}: {json_words(error)}"
            return BadExampleError(field="", reason=reason, hint=hint)
        except RecursionError:
            return BadExampleError(field="", reason="JSON is nested too deeply")
        except ValueError as error:  # a number of more than 4300 digits
            return BadExampleError(field="", reason=f"broken JSON: {error}")

    def element(self, text: str, start: int) -> tuple[object, int]:
        """The value at `start` and where it ends."""
        self._issues.clear()
        value, end = self._decoder.raw_decode(text, start)
        return self._strict(value), end


_NUL = BadExampleError(
    field="",
    reason="holds NUL bytes",
    hint="the file is UTF-16 or was not written to its end: save it again as UTF-8",
)


def _lines(file: Path) -> Iterator[tuple[int, str | BadExampleError]]:
    """Line number and text, split at line feeds only: other separators may stand in a text."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            data = raw.removeprefix(_BOM) if number == 1 else raw
            if b"\0" in data:
                yield number, _NUL
                continue
            try:
                yield number, data.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> BadExampleError:
    byte = error.object[error.start]
    reason = f"byte 0x{byte:02x} in column {error.start + 1} is not UTF-8"
    return BadExampleError(
        field="", reason=reason, hint="convert the file: iconv -f latin1 -t utf8"
    )


def _json_lines(file: Path) -> Iterator[Record]:
    decoder = _StrictDecoder()
    row = 0
    for number, text in _lines(file):
        if isinstance(text, str) and not text.strip(" \t\r\n"):
            continue
        row += 1
        value = text if isinstance(text, BadExampleError) else decoder.line(text)
        yield Place(file=str(file), row=row, line=number), value


def _broken(file: Path, line: int, row: int, reason: str) -> UsageError:
    message = f"{file}:{line}: row {row}: {reason}"
    return UsageError(message, "after this place nothing of the file can be read: correct it")


def _json_array(file: Path) -> Iterator[Record]:
    data = file.read_bytes().removeprefix(_BOM)
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        message = f"{file}:{line}: {_NUL.reason}"
        raise UsageError(message, _NUL.hint)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = _not_utf8(error)
        message = f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8"
        raise UsageError(message, reason.hint) from None
    decoder = _StrictDecoder()
    position, line, row = text.index("[") + 1, 1, 0
    counted = 0
    while True:
        position = _end_of_space(text, position)
        line += text.count("\n", counted, position)
        counted = position
        if row == 0 and text.startswith("]", position):
            break
        row += 1
        try:
            value, end = decoder.element(text, position)
        except json.JSONDecodeError as error:
            raise _broken(file, error.lineno, row, f"broken JSON: {json_words(error)}") from None
        except RecursionError:
            raise _broken(file, line, row, "JSON is nested too deeply") from None
        except ValueError as error:
            raise _broken(file, line, row, f"broken JSON: {error}") from None
        yield Place(file=str(file), row=row, line=line), value
        position = _end_of_space(text, end)
        if not text.startswith(",", position):
            break
        position += 1
    _expect_end(file, text, position, row)


def _end_of_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return start if match is None else match.end()


def _expect_end(file: Path, text: str, position: int, row: int) -> None:
    line = text.count("\n", 0, position) + 1
    if not text.startswith("]", position):
        raise _broken(file, line, row, "broken JSON: expected , or ] after it")
    if _end_of_space(text, position + 1) < len(text):
        raise _broken(file, line, row, "more text follows the end of the array")


def _csv(file: Path, delimiter: str) -> Iterator[Record]:
    """Rows of a CSV file with a header line."""
    limit = csv.field_size_limit(sys.maxsize)  # long answers are no error
    reader = csv.reader(_csv_text(file), delimiter=delimiter, strict=True)
    row, line = 0, 1
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            message = f"{file}:1: the header names a column twice"
            raise UsageError(message)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                row += 1
                yield Place(file=str(file), row=row, line=line), _csv_record(header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise _broken(file, line, row + 1, f"broken CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _csv_record(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        reason = f"has {len(cells)} fields, the header has {len(header)}"
        return BadExampleError(
            field="", reason=reason, hint="quote fields that hold commas or line breaks"
        )
    return dict(zip(header, cells, strict=True))


def _csv_text(file: Path) -> Iterator[str]:
    for number, text in _lines(file):
        if isinstance(text, BadExampleError):
            message = f"{file}:{number}: {text.reason}"
            raise UsageError(message, text.hint)
        yield text


def _parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        message = f"{file} is Parquet, which needs pyarrow"
        raise NotReadyError(message, "pip install pyarrow") from None
    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=4096):
                for record in batch.to_pylist():
                    row += 1
                    yield Place(file=str(file), row=row), record
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{file}: broken Parquet after row {row}: {reason}"
        raise UsageError(message) from None
