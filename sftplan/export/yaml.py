"""Just enough YAML to write configurations: mappings, lists and scalars, in the order given."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./@+-]*")
_RESERVED = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "none"}


def _scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    plain = _PLAIN.fullmatch(text) and text.lower() not in _RESERVED
    return text if plain else json.dumps(text, ensure_ascii=False)


def _entry(prefix: str, value: object, indent: int) -> list[str]:
    pad = " " * indent
    if isinstance(value, str) and "\n" in value:
        body = [f"{pad}  {line}".rstrip() for line in value.rstrip("\n").splitlines()]
        return [f"{pad}{prefix} |", *body]
    if isinstance(value, Mapping | list | tuple) and value:
        return [f"{pad}{prefix}", *yaml_lines(value, indent + 2)]
    if isinstance(value, Mapping | list | tuple):
        return [f"{pad}{prefix} " + ("{}" if isinstance(value, Mapping) else "[]")]
    return [f"{pad}{prefix} {_scalar(value)}"]


def yaml_lines(value: Mapping[str, object] | Sequence[object], indent: int = 0) -> list[str]:
    """The lines of a mapping or a list.

    >>> yaml_lines({"a": 1, "b": {"c": "yes"}, "d": ["x", True]})
    ['a: 1', 'b:', '  c: "yes"', 'd:', '  - x', '  - true']
    """
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            lines += _entry(f"{key}:", item, indent)
        return lines
    for item in value:
        if isinstance(item, Mapping) and item:
            inner = yaml_lines(item, indent + 2)
            lines += [" " * indent + "- " + inner[0].lstrip(), *inner[1:]]
        else:
            lines += _entry("-", item, indent)
    return lines


def render_yaml(value: Mapping[str, object], *comments: str) -> str:
    """A YAML document under its comments."""
    return "\n".join([*(f"# {comment}" for comment in comments), *yaml_lines(value), ""])
