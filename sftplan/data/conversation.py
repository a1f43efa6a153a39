"""What an instruction file holds, and what can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sftplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBLEMS_SHOWN = 20  # the rest is counted


class Role(StrEnum):
    """Who speaks. Only the assistant's turns are trained on."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn; `calls` is the JSON text of an assistant's tool calls, as the file has it.

    `trained`: whether it counts if it is an answer.
    """

    role: Role
    text: str
    calls: str = ""
    trained: bool = True

    @property
    def spoken(self) -> str:
        """Text and calls as one text, for templates that know no tools."""
        return "\n".join(part for part in (self.text, self.calls) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an example stands; rows and lines count from 1, Parquet has no lines."""

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns with at least one answer. `verbatim`: prompt and completion strings, no template.

    `tools` is the JSON text of the functions offered to the assistant, or empty.
    """

    turns: tuple[Turn, ...]
    place: Place
    tools: str = ""
    verbatim: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why one example cannot be used. Never quotes the data itself."""

    place: Place
    field: str
    reason: str
    hint: str | None = None

    def __str__(self) -> str:
        field = f" {self.field}:" if self.field else ""
        return f"{self.place}:{field} {self.reason}"


class BadExampleError(Exception):
    """One example is bad; whoever reads the file adds the place."""

    def __init__(self, *, field: str, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason
        self.hint = hint

    def at(self, place: Place) -> Problem:
        """The problem with its place."""
        return Problem(place=place, field=self.field, reason=self.reason, hint=self.hint)


def refuse_beyond(problems: Sequence[Problem], *, skip_bad: int, num_examples: int) -> None:
    """Raise UsageError when more examples are bad than `skip_bad` allows, or none is good."""
    if len(problems) <= skip_bad and len(problems) < num_examples:
        return
    if len(problems) == 1 and num_examples > 1:
        hint = problems[0].hint or "correct it, or leave it out with --skip-bad 1"
        raise UsageError(str(problems[0]), hint)
    shown = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
    more = len(problems) - PROBLEMS_SHOWN
    rest = f"\n  and {more:,} more" if more > 0 else ""
    allowed = f" ({skip_bad:,} allowed)" if skip_bad else ""
    message = (
        f"{len(problems):,} of {num_examples:,} examples cannot be used{allowed}:{shown}{rest}"
    )
    remedy = f"correct them, or leave them out with --skip-bad {len(problems)}"
    if len(problems) == num_examples:
        remedy = "correct them: there is no other example"
    raise UsageError(message, problems[0].hint or remedy)
