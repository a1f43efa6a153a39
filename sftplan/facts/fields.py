"""Checked reading of a JSON object that somebody else wrote; wrong values are named with place."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, NoReturn

from sftplan.errors import UsageError, did_you_mean, json_words

if TYPE_CHECKING:
    from collections.abc import Mapping

_MISSING = object()


def show_value(value: object) -> str:
    """A value as JSON writes it, short enough for a message.

    >>> show_value("48"), show_value(None), show_value(10**30)
    ('"48"', 'null', 'an integer of 100 bits')
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reject_constant(name: str) -> NoReturn:
    message = f"{name} is not a JSON value"
    raise ValueError(message)


def parse_object(text: str, source: str) -> dict[str, object]:
    """The JSON object in `text`; `source` (a path or an address) begins every message."""
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        message = f"{source}:{error.lineno}:{error.colno}: broken JSON: {json_words(error)}"
        raise UsageError(message, _broken_hint(text)) from None
    except RecursionError:
        message = f"{source}: nested too deeply to be a configuration"
        raise UsageError(message) from None
    except ValueError as error:  # NaN, Infinity, or an integer with thousands of digits
        place = re.search(r"-?(?:NaN|Infinity)|\d{1000}", text)
        line = f":{text.count(chr(10), 0, place.start()) + 1}" if place else ""
        reason = "an integer with too many digits" if "digits" in str(error) else str(error)
        message = f"{source}{line}: {reason}"
        raise UsageError(message) from None
    if not isinstance(value, dict):
        message = f"{source}: holds {show_value(value)}, not a JSON object"
        raise UsageError(message, 'a configuration looks like {"model_type": "llama", ...}')
    return value


def _broken_hint(text: str) -> str | None:
    if not text.strip():
        return "the file is empty"
    if text.lstrip()[0] not in "{[":
        return "this does not look like JSON; is it the right file?"
    return None


class Fields:
    """The fields of one JSON object. `text`, where known, lets a message name the line."""

    def __init__(self, values: Mapping[str, object], source: str, text: str = "") -> None:
        self.values = values
        self.source = source
        self.text = text

    def fail(self, key: str, problem: str, hint: str | None = None) -> NoReturn:
        """Raise a usage error about the field `key`."""
        found = re.search(rf'"{re.escape(key)}"\s*:', self.text)
        line = f":{self.text.count(chr(10), 0, found.start()) + 1}" if found else ""
        message = f"{self.source}{line}: {key} {problem}"
        raise UsageError(message, hint)

    def find(self, *keys: str) -> tuple[str, object]:
        """The first of `keys` that is there with its value; without any, the first and None."""
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        return keys[0], None

    def integer(
        self, *keys: str, maximum: int, default: int | None = None, minimum: int = 1
    ) -> int:
        """An integer that must be there unless it has a default; null counts as absent."""
        key, value = self.find(*keys)
        if value is None:
            if default is None:
                close = did_you_mean(key, [k for k in self.values if isinstance(k, str)])
                self.fail(key, "is missing", close)
            return default
        return self._checked_integer(key, value, minimum, maximum)

    def nullable_integer(
        self, key: str, *, maximum: int, missing: int | None, minimum: int = 1
    ) -> int | None:
        """An integer or null; an absent key stands for `missing`, which may differ from null."""
        value = self.values.get(key, _MISSING)
        if value is _MISSING or value is None:
            return missing if value is _MISSING else None
        return self._checked_integer(key, value, minimum, maximum)

    def _checked_integer(self, key: str, value: object, minimum: int, maximum: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"is {show_value(value)}; an integer is needed", _unquoted(key, value))
        if not minimum <= value <= maximum:
            problem = f"is {show_value(value)}; it must be between {minimum} and {maximum:,}"
            self.fail(key, problem)
        return value

    def nullable_number(self, key: str, missing: float | None = None) -> float | None:
        """A finite number above zero, or null."""
        value = self.values.get(key, missing)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"is {show_value(value)}; a number is needed")
        if not 0 < value < 1e30 or not math.isfinite(value):
            self.fail(key, f"is {show_value(value)}; a positive number is needed")
        return float(value)

    def fraction(self, *keys: str, default: float = 0.0) -> float:
        """A number from 0 to 1."""
        key, value = self.find(*keys)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            self.fail(key, f"is {show_value(value)}; a number from 0 to 1 is needed")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"is {show_value(value)}; true or false is needed")
        return value

    def word(self, *keys: str, default: str) -> str:
        """A string; null counts as absent."""
        key, value = self.find(*keys)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(key, f"is {show_value(value)}; a string is needed")
        return value

    def items(self, key: str) -> list[object] | None:
        """A list or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            self.fail(key, f"is {show_value(value)}; a list is needed")
        return value

    def inner(self, key: str) -> Fields | None:
        """An object inside this one, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, f"is {show_value(value)}; an object is needed")
        return Fields(value, self.source, self.text)


def _unquoted(key: str, value: object) -> str | None:
    """A hint where a string or a float clearly means an integer."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return f'write it without quotes: "{key}": {value}'
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f'write it as an integer: "{key}": {int(value)}'
    return None
