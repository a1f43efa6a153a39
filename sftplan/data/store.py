"""Tokenised examples in one buffer, a file mapped into memory or bytes: no object per example.

An entry of the buffer is, in this order: for each example its ids (32 bit) and its mask (a byte per
token, up to a multiple of 4); columns of 64-bit integers; a line of JSON; the length of that line;
the SHA-256 of all before. Processes of one machine that map the same file share its pages.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import index as as_index
from typing import TYPE_CHECKING, Any, overload

from sftplan.data.conversation import Place
from sftplan.data.mask import Example

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

COLUMNS = ("length", "trained", "file", "row", "line")
_ID_BYTES, _WORD_BYTES, _DIGEST_BYTES = 4, 8, 32
_NO_LINE = -1


class Examples(Sequence[Example]):
    """Examples that are made when they are asked for; how long they are is known without that."""

    lengths: Sequence[int]  # tokens
    trained: Sequence[int]  # tokens whose loss counts

    def at(self, index: int) -> Example:
        """Example `index`, from 0."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self.at(number) for number in range(len(self))[index]]
        return self.at(range(len(self))[as_index(index)])

    def __iter__(self) -> Iterator[Example]:
        return map(self.at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compared by content


class Stored(Examples):
    """The examples of a buffer that a `Writer` has filled."""

    def __init__(self, buffer: memoryview, end: int, names: Sequence[str], count: int) -> None:
        columns: list[Sequence[int]] = []
        for number in range(len(COLUMNS)):
            start = end + number * count * _WORD_BYTES
            columns.append(buffer[start : start + count * _WORD_BYTES].cast("q"))
        self.lengths, self.trained, self._file, self._row, self._line = columns
        self._names, self._buffer = names, buffer
        self._starts = array("q", accumulate(map(_record_bytes, self.lengths), initial=0))

    def at(self, index: int) -> Example:
        """Example `index`, its ids and its mask copied out of the buffer."""
        start, length, line = self._starts[index], self.lengths[index], self._line[index]
        middle = start + _ID_BYTES * length
        ids = array("i")
        ids.frombytes(self._buffer[start:middle])
        place = Place(
            file=self._names[self._file[index]],
            row=self._row[index],
            line=None if line == _NO_LINE else line,
        )
        trained = bytes(self._buffer[middle : middle + length])
        return Example(input_ids=ids, trained=trained, place=place)


class Selected(Examples):
    """Some of the examples of a sequence, a few of them replaced by others, such as shorter ones."""

    def __init__(
        self,
        source: Sequence[Example],
        indices: Sequence[int],
        replaced: Mapping[int, Example] | None = None,
    ) -> None:
        lengths, trained = counts(source)
        self._source, self._replaced = source, replaced or {}
        self._indices = array("q", indices)
        self.lengths = array("q", (lengths[index] for index in self._indices))
        self.trained = array("q", (trained[index] for index in self._indices))
        if self._replaced:
            for number, index in enumerate(self._indices):
                if index in self._replaced:
                    self.lengths[number] = len(self._replaced[index])
                    self.trained[number] = self._replaced[index].num_trained

    def at(self, index: int) -> Example:
        """Example `index` of the selection."""
        original = self._indices[index]
        found = self._replaced.get(original)
        return self._source[original] if found is None else found


def counts(examples: Sequence[Example]) -> tuple[Sequence[int], Sequence[int]]:
    """Tokens of each example, and those whose loss counts."""
    if isinstance(examples, Examples):
        return examples.lengths, examples.trained
    return [len(example) for example in examples], [example.num_trained for example in examples]


class Writer:
    """Fills a stream with an entry, example by example."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self._columns = [array("q") for _ in COLUMNS]
        self._names: dict[str, int] = {}
        self._size = 0
        self._largest_id = 0

    def add(self, examples: Iterable[Example]) -> None:
        """Append examples."""
        for example in examples:
            length, place = len(example), example.place
            self._put(example.input_ids.tobytes())
            self._put(example.trained + bytes(-length % _ID_BYTES))
            self._largest_id = max(self._largest_id, max(example.input_ids, default=0))
            values = (
                length,
                example.num_trained,
                self._names.setdefault(place.file, len(self._names)),
                place.row,
                _NO_LINE if place.line is None else place.line,
            )
            for column, value in zip(self._columns, values, strict=True):
                column.append(value)

    def finish(self, header: Mapping[str, Any]) -> None:
        """Write the columns and the header; nothing can be added then."""
        self._put(bytes(-self._size % _WORD_BYTES))
        end = self._size
        for column in self._columns:
            self._put(column.tobytes())
        own = {
            "end": end,
            "num_examples": len(self._columns[0]),
            "names": list(self._names),
            "largest_id": self._largest_id,
        }
        text = json.dumps({**header, **own}).encode()
        self._put(text)
        self._put(len(text).to_bytes(_WORD_BYTES, "little"))
        self._stream.write(self._digest.digest())

    def _put(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)


def opened(buffer: memoryview) -> tuple[Stored, dict[str, Any]] | None:
    """Examples and header of a buffer, or None if it is not whole."""
    size = len(buffer) - _DIGEST_BYTES
    if size < _WORD_BYTES or hashlib.sha256(buffer[:size]).digest() != buffer[size:]:
        return None
    text_end = size - _WORD_BYTES
    text_start = text_end - int.from_bytes(buffer[text_end:size], "little")
    header: dict[str, Any] = json.loads(bytes(buffer[text_start:text_end]))
    stored = Stored(buffer, header["end"], header["names"], header["num_examples"])
    return stored, header


def _record_bytes(length: int) -> int:
    """Bytes of an example of `length` tokens: ids, then the mask up to a multiple of 4.

    >>> _record_bytes(3)
    16
    """
    return _ID_BYTES * length + length + -length % _ID_BYTES
