"""The plan file: one JSON document, the same as `--json`, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sftplan.errors import UsageError, json_words
from sftplan.plan.position import line_of
from sftplan.plan.record import FORMAT, FORMAT_VERSION, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

# What a file may hold of the figures that a run computes with; beyond them it would fail far from here.
_BOUNDS = {
    "inputs.model.num_layers": (1, math.inf),
    "inputs.model.vocab_size": (1, math.inf),
    "inputs.hardware.num_gpus": (1, math.inf),
    "inputs.hardware.gpus_per_node": (1, math.inf),
    "inputs.hardware.num_nodes": (1, math.inf),
    "inputs.hardware.gpu.memory_bytes": (1, math.inf),
    "inputs.workload.seq_len": (2, math.inf),
    "inputs.workload.global_batch": (1, math.inf),
    "inputs.workload.epochs": (0, math.inf),
    "strategy.zero": (0, 3),
    "strategy.micro_batch": (1, math.inf),
    "strategy.accumulation": (1, math.inf),
    "strategy.attention_dropout": (0, 1),
    "strategy.max_grad_norm": (0, math.inf),
}
_EXACT_FLOAT_LIMIT = 2**53  # beyond it a float is no longer every integer


def document(value: object) -> object:
    """A record as what JSON knows: objects, arrays, text, numbers.

    A whole number is an integer whatever type holds it, so that a record that was read back
    renders to the same bytes.

    >>> document({"a": 2.0, "b": (0.5, None)})
    {'a': 2, 'b': [0.5, None]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: document(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): document(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [document(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_FLOAT_LIMIT:
        return int(value)
    return value


def plan_document(plan: Plan) -> dict[str, object]:
    """The JSON object of a plan: what `--json` prints and the file holds."""
    return {f.name: document(getattr(plan, f.name)) for f in dataclasses.fields(plan)}


def render_plan(plan: Plan) -> str:
    """The text of a plan's file, with its trailing newline."""
    return json.dumps(plan_document(plan), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plan_sha256(plan: Plan) -> str:
    """SHA-256 of the plan's file as this version writes it, in hexadecimal."""
    return hashlib.sha256(render_plan(plan).encode()).hexdigest()


def write_text(text: str, path: str | Path) -> None:
    """Replace the file at `path` in one step; a device such as /dev/null is written to instead."""
    target = Path(path)
    try:
        target = target.resolve()
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        draft = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with draft.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise UsageError(message) from None


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write the plan's file, whole or not at all."""
    write_text(render_plan(plan), path)


def _reject_constant(name: str) -> NoReturn:
    message = f"{name} is not a JSON number"
    raise ValueError(message)


def read_json(path: str | Path) -> tuple[str, dict[str, object]]:
    """Text and top-level object of one of our JSON files."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        parsed = json.loads(text, parse_constant=_reject_constant)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
        raise UsageError(message) from None
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: not JSON: {json_words(error)} at column {error.colno}"
        raise UsageError(message) from None
    except RecursionError:
        message = f"{path}: nested too deeply"
        raise UsageError(message) from None
    except ValueError as error:  # not UTF-8, NaN, or an integer of thousands of digits
        message = f"{path}: {error}"
        raise UsageError(message) from None
    if not isinstance(parsed, dict):
        message = f"{path}:1: expected an object, found {type(parsed).__name__}"
        raise UsageError(message)
    return text, parsed


def _version(text: object, where: str) -> tuple[int, int]:
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        message = f"{where}: format_version {text!r} is not a version such as {FORMAT_VERSION}"
        raise UsageError(message)
    return int(parts[0]), int(parts[1])


def _is_newer_minor(header: Mapping[str, object], text: str, path: str | Path) -> bool:
    """Whether the file may hold keys unknown to this version; refuses what is not a plan."""
    if header.get("format") != FORMAT:
        message = f"{path}: format is {header.get('format')!r}, expected {FORMAT!r}"
        raise UsageError(message, "`sftplan show FILE` prints any file that sftplan wrote")
    where = f"{path}:{line_of(text, ['format_version'])}"
    theirs = _version(header.get("format_version"), where)
    ours = _version(FORMAT_VERSION, where)
    if theirs[0] != ours[0]:
        message = (
            f"{where}: plan format {header['format_version']}, this sftplan reads {FORMAT_VERSION}"
        )
        newer = theirs[0] > ours[0]
        hint = "upgrade sftplan" if newer else "plan again: the file's `command` says how"
        raise UsageError(message, hint)
    return theirs > ours


def _unknown_key(theirs: object, ours: object) -> list[str | int] | None:
    """The path of the first key in `theirs` that the record read from it does not have."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key, value in theirs.items():
            inner = _unknown_key(value, ours[key]) if key in ours else []
            if inner is not None:
                return [key, *inner]
    elif isinstance(theirs, list) and isinstance(ours, list):
        for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            inner = _unknown_key(their, our)
            if inner is not None:
                return [index, *inner]
    return None


def _field_error(
    path: str | Path, text: str, field: Sequence[str | int], problem: str
) -> UsageError:
    name = ".".join(str(step) for step in field)
    message = f"{path}:{line_of(text, field)}: {name}: {problem}"
    return UsageError(message, "a plan file is not made for editing: plan again")


def read_plan(path: str | Path) -> Plan:
    """The plan in a file, or a UsageError that names file, line and field."""
    text, header = read_json(path)
    newer = _is_newer_minor(header, text, path)
    from pydantic import TypeAdapter, ValidationError

    try:
        plan = TypeAdapter(Plan).validate_json(text.encode(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = first["msg"][:1].lower() + first["msg"][1:]
        raise _field_error(path, text, first["loc"], problem) from None
    for name, (low, high) in _BOUNDS.items():
        value = attrgetter(name)(plan)
        if isinstance(value, int | float) and not low <= value <= high:
            bound = f"at least {low}" if value < low else f"at most {high}"
            raise _field_error(path, text, name.split("."), f"{value} has to be {bound}")
    unknown = None if newer else _unknown_key(header, plan_document(plan))
    if unknown is not None:
        raise _field_error(path, text, unknown, "no such field")
    return plan
