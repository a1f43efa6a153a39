"""What was asked for: pins and amounts of work, checked and in their types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sftplan.errors import UsageError, did_you_mean
from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
)
from sftplan.search.rows import LARGEST_MICRO_BATCH

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import StrEnum

    from sftplan.facts.model import ModelShape

DEFAULT_GLOBAL_BATCH = 64
DEFAULT_MARGIN_FRACTION = 0.05
# Beyond these a typing error is likelier than a run.
LARGEST_COUNT = 10**15
LARGEST_EPOCHS = 10**6

CHOICES: Mapping[str, type[StrEnum]] = {
    "precision": Precision,
    "offload": Offload,
    "checkpointing": Checkpointing,
    "attention": Attention,
    "loss": Loss,
    "optimizer": Optimizer,
    "allocator": Allocator,
}
SWITCHES = ("packing", "compile")
COUNTS = ("checkpointed_layers", "micro_batch", "accumulation")
STRATEGY_KNOBS = (*CHOICES, "zero", *SWITCHES, *COUNTS, "attention_dropout", "max_grad_norm")


def option_name(knob: str) -> str:
    """The knob as one types it.

    >>> option_name("micro_batch"), option_name("seq_len")
    ('--micro-batch', '--seq')
    """
    return "--" + ("seq" if knob == "seq_len" else knob.replace("_", "-"))


def check_count(knob: str, value: object, most: int = LARGEST_COUNT) -> int:
    """A whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{option_name(knob)} {value!r} is not a whole number"
        raise UsageError(message)
    if not 1 <= value <= most:
        bound = "at least 1" if value < 1 else f"at most {most:,}"
        message = f"{option_name(knob)} {value} has to be {bound}"
        raise UsageError(message)
    return value


def check_number(knob: str, value: object, low: float, high: float = math.inf) -> float:
    """A finite number from `low` up to, not including, `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"{option_name(knob)} {value!r} is not a number"
        raise UsageError(message)
    if not (math.isfinite(value) and low <= value < high):
        upper = f"below {high:,}" if high < math.inf else "finite"
        bound = f"at least {low:g} and {upper}"
        message = f"{option_name(knob)} {value:g} has to be {bound}"
        raise UsageError(message)
    return float(value)


def check_seq_len(value: object, model: ModelShape) -> int:
    """A sequence length that the model has positions for."""
    seq_len = check_count("seq_len", value)
    if seq_len < 2:
        message = (
            f"--seq {seq_len} has to be at least 2: a first token has nothing to be predicted from"
        )
        raise UsageError(message)
    if seq_len > model.max_positions:
        message = (
            f"--seq {seq_len:,} is {seq_len - model.max_positions:,} more than the "
            f"{model.max_positions:,} positions of {model.name}"
        )
        raise UsageError(message, f"`--seq {model.max_positions}` is its longest")
    return seq_len


def _choice(knob: str, value: object) -> StrEnum:
    kind = CHOICES[knob]
    try:
        return kind(str(value))
    except ValueError:
        known = [member.value for member in kind]
        message = f"{option_name(knob)} {value!r} is none of {', '.join(known)}"
        raise UsageError(message, did_you_mean(str(value), known)) from None


def _pin(knob: str, value: object) -> object:
    if knob in CHOICES:
        return _choice(knob, value)
    if knob == "micro_batch":
        return check_count(knob, value, LARGEST_MICRO_BATCH)
    if knob in COUNTS:
        return check_count(knob, value)
    if knob == "max_grad_norm":
        return check_number(knob, value, 0.0)
    if knob == "attention_dropout":
        return "model" if value == "model" else check_number(knob, value, 0.0, 1.0)
    if knob == "zero":
        if isinstance(value, bool) or value not in (0, 1, 2, 3):
            message = f"--zero {value!r} is none of 0, 1, 2, 3"
            raise UsageError(message)
        return value
    if not isinstance(value, bool):
        message = f"{option_name(knob)} {value!r} is neither True nor False"
        raise UsageError(message)
    return value


def _check_varlen(pins: Mapping[str, object]) -> None:
    if pins.get("attention") is not Attention.VARLEN:
        return
    if pins.get("precision") is Precision.FP32:
        message = "--attention varlen needs 16-bit products, --precision fp32 has none"
        raise UsageError(message, "`--attention sdpa`, or `--precision bf16-mixed`")
    if pins.get("attention_dropout", 0.0) != 0.0:
        message = "--attention varlen has no dropout"
        raise UsageError(message, "`--attention-dropout 0`, or `--attention sdpa`")


def read_pins(knobs: Mapping[str, object]) -> dict[str, object]:
    """The strategy's knobs that were given, each in its type."""
    for knob in knobs:
        if knob not in STRATEGY_KNOBS:
            message = f"no knob {knob!r}"
            raise UsageError(message, did_you_mean(knob, STRATEGY_KNOBS))
    pins = {knob: _pin(knob, value) for knob, value in knobs.items() if value is not None}
    _check_varlen(pins)
    return pins


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows per step over all GPUs; `pinned` if they were given, else `assumption` says what for."""

    rows: int
    pinned: bool
    assumption: str | None = None


def resolve_batch(global_batch: object, pins: Mapping[str, object], num_gpus: int) -> Batch:
    """The global batch that was asked for, or the default that what is pinned allows.

    >>> resolve_batch(None, {"micro_batch": 2, "accumulation": 3}, 2).rows
    12
    >>> resolve_batch(None, {"micro_batch": 5}, 2).rows  # 64 up to a multiple of 10
    70
    """
    micro, accumulation = pins.get("micro_batch"), pins.get("accumulation")
    unit = num_gpus
    for pinned in (micro, accumulation):
        unit *= pinned if isinstance(pinned, int) else 1
    whole = micro is not None and accumulation is not None
    if global_batch is None:
        if whole:
            return Batch(rows=unit, pinned=True)
        rows = math.ceil(DEFAULT_GLOBAL_BATCH / unit) * unit
        assumption = f"global batch {rows} rows: `--global-batch` pins another"
        return Batch(rows=rows, pinned=False, assumption=assumption)
    rows = check_count("global_batch", global_batch)
    parts = [f"micro-batch {micro}"] if micro is not None else []
    parts += [f"accumulation {accumulation}"] if accumulation is not None else []
    product = " x ".join([*parts, f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"])
    if whole and rows != unit:
        message = f"--global-batch {rows} is not {product} = {unit}"
        raise UsageError(message, "leave one of them out")
    if rows % unit:
        message = f"--global-batch {rows} cannot be split over {product}"
        below, above = rows // unit * unit, math.ceil(rows / unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise UsageError(message, f"{near} can")
    return Batch(rows=rows, pinned=True)


def check_minimize(value: object) -> Literal["time", "cost", "memory"]:
    """What the best strategy has least of."""
    match value:
        case None | "time":
            return "time"
        case "cost":
            return "cost"
        case "memory":
            return "memory"
        case _:
            message = f"--minimize {value!r} is none of time, cost, memory"
            raise UsageError(message)
