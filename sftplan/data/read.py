"""Instruction files (JSON, JSONL, Parquet, CSV, a folder of them) to conversations.

Nothing is dropped without a word: every example is a conversation or a problem with its place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftplan.data.conversation import BadExampleError, Role, refuse_beyond
from sftplan.data.formats import conversation_of
from sftplan.data.records import SUFFIXES, records_of
from sftplan.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sftplan.data.conversation import Conversation, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """What a file or folder holds: conversations, what was skipped, and what else to know."""

    source: str
    conversations: tuple[Conversation, ...]
    skipped: tuple[Problem, ...]
    notes: tuple[str, ...]


def read_instructions(path: str | Path, *, skip_bad: int = 0) -> Instructions:
    """Read a file or a folder; up to `skip_bad` bad examples are skipped and reported.

    Raises:
        UsageError: More examples are bad, or a file cannot be read at all; names file, line,
            field, reason and what to do.
    """
    files, notes = files_of(Path(path))
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    ignored: Counter[str] = Counter()
    num_cut = 0
    for file in files:
        for place, record in records_of(file):
            try:
                if isinstance(record, BadExampleError):
                    raise record
                conversation, unused = conversation_of(record, place)
            except BadExampleError as error:
                problems.append(error.at(place))
                continue
            conversations.append(conversation)
            ignored.update(unused)
            num_cut += conversation.turns[-1].role is not Role.ASSISTANT
    num_examples = len(conversations) + len(problems)
    if num_examples == 0:
        message = f"{path} holds no examples"
        raise UsageError(message)
    refuse_beyond(problems, skip_bad=skip_bad, num_examples=num_examples)
    notes += [f"field {name!r} is not used ({n:,} examples)" for name, n in ignored.most_common(10)]
    if num_cut:
        notes.append(f"{num_cut:,} examples end with turns that nothing answers: not trained on")
    return Instructions(
        source=str(path),
        conversations=tuple(conversations),
        skipped=tuple(problems),
        notes=tuple(notes),
    )


def first_lines(problems: Iterable[Problem], limit: int = 20) -> list[str]:
    """The first problems as text, then how many more there are."""
    texts = [str(problem) for problem in problems]
    rest = len(texts) - limit
    return texts[:limit] + ([f"and {rest:,} more"] if rest > 0 else [])


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
