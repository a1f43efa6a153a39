"""Instruction data (JSON, JSONL, Parquet, CSV, a folder of them, the hub) to conversations.

Nothing is dropped without a word: every example is a conversation or a problem with its place.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sftplan.data.conversation import BadExampleError, Role, refuse_beyond
from sftplan.data.formats import conversation_of
from sftplan.data.hub import hub_split, is_hub_name
from sftplan.data.records import SUFFIXES, records_of
from sftplan.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sftplan.data.conversation import Conversation, Place, Problem
    from sftplan.data.records import Record


class Source(Protocol):
    """Where records come from."""

    @property
    def name(self) -> str:
        """As places name it."""

    def digest(self) -> bytes:
        """Of the content."""

    def records(self) -> Iterator[Record]:
        """The records, from the first on."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file as a source of records."""

    path: Path

    @property
    def name(self) -> str:
        """As places name it."""
        return str(self.path)

    def digest(self) -> bytes:
        """SHA-256 of its content."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()

    def records(self) -> Iterator[Record]:
        """Its records, from the first on."""
        return records_of(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """What a file or folder holds: conversations, what was skipped, and what else to know."""

    source: str
    conversations: tuple[Conversation, ...]
    skipped: tuple[Problem, ...]
    notes: tuple[str, ...]


class Reader:
    """The conversations of a file, a folder or a data set of the hub, one after the other.

    What was skipped and what else to know is complete once the last one is read. As soon as more
    examples are bad than `skip_bad` allows, no more conversations come: only what is bad is still
    looked for, and the end raises UsageError.
    """

    def __init__(self, path: str | Path, *, skip_bad: int = 0) -> None:
        self.path, self.skip_bad = path, skip_bad
        self.problems: list[Problem] = []
        self.num_read = 0  # bad ones included
        self._sources, self._notes = sources_of(path)
        self._ignored: Counter[str] = Counter()
        self._num_unanswered = 0

    def __iter__(self) -> Iterator[Conversation]:
        for source in self._sources:
            for place, record in source.records():
                conversation = self._conversation(place, record)
                if conversation is not None and len(self.problems) <= self.skip_bad:
                    yield conversation
        if self.num_read == 0:
            message = f"{self.path} holds no examples"
            raise UsageError(message)
        refuse_beyond(self.problems, skip_bad=self.skip_bad, num_examples=self.num_read)

    def _conversation(self, place: Place, record: object | BadExampleError) -> Conversation | None:
        self.num_read += 1
        try:
            if isinstance(record, BadExampleError):
                raise record
            conversation, unused = conversation_of(record, place)
        except BadExampleError as error:
            self.problems.append(error.at(place))
            return None
        self._ignored.update(unused)
        self._num_unanswered += conversation.turns[-1].role is not Role.ASSISTANT
        return conversation

    @property
    def notes(self) -> list[str]:
        """What else to know of what was read."""
        unused = self._ignored.most_common(10)
        found = [f"field {name!r} is not used ({n:,} examples)" for name, n in unused]
        if self._num_unanswered:
            number = f"{self._num_unanswered:,}"
            found.append(f"{number} examples end with turns that nothing answers: not trained on")
        return [*self._notes, *found]


def read_instructions(path: str | Path, *, skip_bad: int = 0) -> Instructions:
    """Read everything at once; up to `skip_bad` bad examples are skipped and reported.

    Raises:
        UsageError: More examples are bad, or a file cannot be read at all; names file, line,
            field, reason and what to do.
    """
    reader = Reader(path, skip_bad=skip_bad)
    conversations = tuple(reader)
    return Instructions(
        source=str(path),
        conversations=conversations,
        skipped=tuple(reader.problems),
        notes=tuple(reader.notes),
    )


def first_lines(problems: Iterable[Problem], limit: int = 20) -> list[str]:
    """The first problems as text, then how many more there are."""
    texts = [str(problem) for problem in problems]
    rest = len(texts) - limit
    return texts[:limit] + ([f"and {rest:,} more"] if rest > 0 else [])


def sources_of(path: str | Path) -> tuple[Sequence[Source], list[str]]:
    """What to read: files, or a split of a data set of the hub; and notes on what is left out."""
    if not Path(path).exists() and is_hub_name(str(path)):
        return [hub_split(str(path))], []
    files, notes = files_of(Path(path))
    return [DataFile(file) for file in files], notes


def found_from_anywhere(path: str | Path) -> str:
    """A file or folder under its full path, for a process in another folder; a hub's name as it is."""
    return (
        str(path)
        if not Path(path).exists() and is_hub_name(str(path))
        else str(Path(path).resolve())
    )


def files_of(path: Path) -> tuple[list[Path], list[str]]:
    """The files to read, in a fixed order, and notes on those that are left out."""
    if not path.exists():
        message = f"no file or folder {path}"
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        close = did_you_mean(path.name, [sibling.name for sibling in siblings])
        raise UsageError(message, close)
    if not path.is_dir():
        return [path], []
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    visible = [
        file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    files = [file for file in visible if file.suffix.lower() in SUFFIXES]
    if not files:
        message = f"the folder {path} holds no instruction file"
        raise UsageError(message, f"files that are read: {', '.join(sorted(SUFFIXES))}")
    others = [file for file in visible if file not in files]
    notes = [f"{file.relative_to(path)} is no instruction file: not read" for file in others[:10]]
    return files, notes
