"""Public models that need no network: the fields of their config.json that fix a shape.

One line of `catalogue.json` per model: `names` (the first is the one shown), `hubs` (hub ids, each
with the fields in which it differs) and `config`, in Hugging Face's own spelling.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sftplan.errors import UsageError, did_you_mean
from sftplan.facts.config import shape_from_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.facts.model import ModelShape

_PACKAGE = Path(__file__).resolve().parents[1]
_FILE = Path("models", "catalogue.json")


class Entry(NamedTuple):
    """One model, or one hub id where that differs from its model."""

    name: str
    hub_id: str
    config: Mapping[str, object]


@cache
def entries() -> tuple[Entry, ...]:
    """The models in the order of the file, without their variants."""
    return tuple(
        Entry(names[0], next(iter(hubs)), config) for names, hubs, config in _read_catalogue()
    )


@cache
def _read_catalogue() -> tuple[
    tuple[list[str], dict[str, dict[str, object]], Mapping[str, object]], ...
]:
    installed = _PACKAGE / "_profiles" / _FILE
    path = installed if installed.exists() else _PACKAGE.parent / "profiles" / _FILE
    lines = json.loads(path.read_text(encoding="utf-8"))
    return tuple((line["names"], line["hubs"], line["config"]) for line in lines)


@cache
def _index() -> dict[str, Entry]:
    """Every lower-case spelling of every model: its names, its hub ids and their last parts."""
    found: dict[str, Entry] = {}
    for names, hubs, config in _read_catalogue():
        canonical, *_ = hubs
        for hub_id, changes in hubs.items():
            bare = hub_id.rpartition("/")[2].lower()
            name = names[0] if hub_id == canonical else bare
            entry = Entry(name, hub_id, {**config, **changes})
            found[hub_id.lower()] = entry
            found.setdefault(bare, entry)
        first = found[canonical.lower()]
        found.update((name.lower(), first) for name in names)
    return found


def find_builtin(name: str) -> ModelShape | None:
    """The built-in model of that name or hub id, or None. Case does not matter.

    >>> shape = find_builtin("Qwen/Qwen2.5-7B-Instruct")
    >>> shape.name, shape.hub_id, shape.max_positions
    ('qwen2.5-7b-instruct', 'Qwen/Qwen2.5-7B-Instruct', 32768)
    >>> find_builtin("no-such-model") is None
    True
    """
    entry = _index().get(name.strip().lower())
    if entry is None:
        return None
    return shape_from_config(entry.config, name=entry.name, source="builtin", hub_id=entry.hub_id)


def builtin(name: str) -> ModelShape:
    """The built-in model of that name or hub id.

    >>> builtin("GPT2-Large").num_layers
    36
    """
    shape = find_builtin(name)
    if shape is None:
        message = f"{name!r} is not a built-in model"
        raise UsageError(message, suggest_builtin(name))
    return shape


def builtin_names() -> tuple[str, ...]:
    """The name of each built-in model.

    >>> builtin_names()[:4]
    ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
    """
    return tuple(entry.name for entry in entries())


def suggest_builtin(name: str) -> str:
    """A hint that leads to a built-in model."""
    listing = "`sftplan models` lists the built-in models"
    close = did_you_mean(name[:100], _index())
    return f"{close} {listing}" if close else listing
