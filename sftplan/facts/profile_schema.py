"""What a hardware file may hold: its tables, their fields, and the range that each value has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sftplan.facts.hardware import Source
from sftplan.units import GIB, MIB, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["text", "texts", "flag", "integer", "number", "sources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field: its kind and, of a figure, the least and the largest plausible value."""

    kind: Kind
    low: float = 0.0
    high: float = math.inf
    required: bool = False


_TEXT = Field(kind="text")
_TEXTS = Field(kind="texts")
_SOURCES = Field(kind="sources")
_MEMORY = Field(kind="integer", low=256 * MIB, high=4096 * GIB)
_SPARE = Field(kind="integer", low=0, high=64 * GIB)
_COUNT = Field(kind="integer", low=1, high=100_000)
_FLOPS = Field(kind="number", low=1e10, high=1e17)
_BANDWIDTH = Field(kind="number", low=1e8, high=1e14)
# Above 1 where a card boosts beyond the clock of its data sheet.
_SHARE = Field(kind="number", low=0.01, high=2.0)

RATES: Mapping[str, Field] = {
    "matmul_fraction": _SHARE,
    "hbm_fraction": _SHARE,
    "context_bytes": _SPARE,
    "device_bytes": _SPARE,
    "dispatch_scale": Field(kind="number", low=0.01, high=100.0),
    "allreduce_fraction": _SHARE,
    "pcie_fraction": _SHARE,
    "host_bytes_per_s": _BANDWIDTH,
    "compiled_dispatch_scale": Field(kind="number", low=0.01, high=100.0),
    "allgather_fraction": _SHARE,
    "reducescatter_fraction": _SHARE,
    "cpu_adam_bytes_per_s": _BANDWIDTH,
}

GPU: Mapping[str, Field] = {
    "name": _TEXT,
    "nvml_name": Field(kind="text", required=True),
    "vendor": _TEXT,
    "architecture": _TEXT,
    "compute_capability": Field(kind="number", low=1.0, high=100.0),
    "memory_bytes": Field(
        kind="integer", low=_MEMORY.low, high=_MEMORY.high, required=True
    ),
    "unusable_bytes": _SPARE,
    "hbm_bytes_per_s": Field(kind="number", low=1e9, high=1e14, required=True),
    "bf16_flops_per_s": _FLOPS,
    "fp16_flops_per_s": _FLOPS,
    "tf32_flops_per_s": _FLOPS,
    "fp32_flops_per_s": Field(kind="number", low=_FLOPS.low, high=_FLOPS.high, required=True),
    "nvlink_bytes_per_s": _BANDWIDTH,
    "pcie_bytes_per_s": Field(kind="number", low=1e8, high=1e13, required=True),
    "tdp_w": Field(kind="number", low=1.0, high=100_000.0),
    "power_flops_per_s": _FLOPS,
    "bf16_native": Field(kind="flag"),
}  # fmt: skip

TABLES: Mapping[str, Mapping[str, Field]] = {
    "": {
        "name": Field(kind="text", required=True),
        "gpus_per_node": _COUNT,
        "num_nodes": _COUNT,
        "usd_per_hour": Field(kind="number", low=0.0, high=1e6),
        "price_as_of": _TEXT,
        "internode_bytes_per_s": _BANDWIDTH,
        "notes": _TEXTS,
    },
    "gpu": GPU,
    "rates": {**RATES, "sources": _SOURCES},
    "host": {
        "memory_bytes": Field(kind="integer", low=_MEMORY.low, high=2**60),
        "num_cpus": _COUNT,
    },
    "provenance": {
        "as_of": _TEXT,
        "confidence": _TEXT,
        "references": _TEXTS,
        "unverified": _TEXTS,
        "notes": _TEXTS,
        "sources": _SOURCES,
    },
}


def fault_of(value: Any, field: Field, known: Mapping[str, Field]) -> tuple[str, str | None] | None:
    """What is wrong with a value and what to write instead, or None where nothing is.

    `known` are the figures that a table of sources may name.
    """
    match field.kind:
        case "text":
            right = isinstance(value, str) and value.strip() != ""
            return None if right else ("must be text", None)
        case "texts":
            right = isinstance(value, list) and all(isinstance(each, str) for each in value)
            return None if right else ('must be a list of texts such as ["a", "b"]', None)
        case "flag":
            return None if isinstance(value, bool) else ("must be true or false", None)
        case "sources":
            return _fault_of_sources(value, known)
        case "integer" | "number":
            return _fault_of_figure(value, field)


def _fault_of_sources(value: Any, known: Mapping[str, Field]) -> tuple[str, str | None] | None:
    if not isinstance(value, dict):
        return "must be a table of figures and their sources", None
    allowed = [source.value for source in Source]
    for key, source in value.items():
        if key not in known:
            return f"names {key}, which is no figure here", f"figures: {', '.join(known)}"
        if source not in allowed:
            return f"{key} = {source!r} is no source", f"sources: {', '.join(allowed)}"
    return None


def _fault_of_figure(value: Any, field: Field) -> tuple[str, str | None] | None:
    if isinstance(value, str) and field.kind == "integer":
        return "must be a whole number", _bytes_hint(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number", None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number", None
    if field.kind == "integer" and not isinstance(value, int):
        return "must be a whole number", None
    if not field.low <= value <= field.high:
        hint = None
        if field.low == _MEMORY.low and 0 < value <= 4096:
            hint = f"{value} GiB are {round(value * GIB):_}"
        return f"must lie between {_short(field.low)} and {_short(field.high)}", hint
    return None


def _bytes_hint(text: str) -> str | None:
    try:
        return f"{text} is written {parse_bytes(text):_}"
    except (ValueError, OverflowError):
        return None


def _short(bound: float) -> str:
    return f"{int(bound):_}" if bound < 1e6 and bound == int(bound) else f"{bound:.4g}"
