"""Where in a JSON text a value stands: an error names the line that the user has to look at."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPACE = re.compile(r"[\s,:]*")
_DECODER = json.JSONDecoder()


def _skip(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _enter(text: str, start: int, step: str | int) -> int | None:
    """The offset of member `step` of the object or array at `start`."""
    position = _skip(text, start + 1)
    index = 0
    while text[position] not in "}]":
        name: object = index
        if text[start] == "{":
            name, position = _DECODER.raw_decode(text, position)
            position = _skip(text, position)
        if name == step:
            return position
        _, position = _DECODER.raw_decode(text, position)
        position = _skip(text, position)
        index += 1
    return None


def line_of(text: str, path: Sequence[str | int]) -> int:
    r"""The line (from 1) of the value at `path` in valid JSON, or of its closest ancestor.

    >>> line_of('{"a": 1,\n "b": [\n  2,\n  {"c": 3}]}', ("b", 1, "c"))
    4
    >>> line_of('{"a": {\n "b": 1}}', ("a", "missing"))
    1
    """
    position = _skip(text, 0)
    for step in path:
        if text[position] not in "{[":
            break
        found = _enter(text, position, step)
        if found is None:
            break
        position = found
    return text.count("\n", 0, position) + 1
