"""Hardware files: TOML in base units with the source of each figure, read strictly and written."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError, did_you_mean
from sftplan.facts.hardware import Gpu, Hardware, Host, Provenance, Rates, Source
from sftplan.facts.profile_schema import GPU, RATES, TABLES, fault_of
from sftplan.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

# What an unknown GPU and its host are taken to reach: the middle of what was measured on others.
DEFAULT_RATES: dict[str, float | None] = {
    "matmul_fraction": 0.75,
    "hbm_fraction": 0.85,
    "context_bytes": 500 * MIB,
    "device_bytes": 0,
    "dispatch_scale": 1.0,
    "allreduce_fraction": 0.75,
    "pcie_fraction": 0.78,
    "host_bytes_per_s": 45e9,
    "compiled_dispatch_scale": 1.0,
    "allgather_fraction": None,  # as an all-reduce
    "reducescatter_fraction": None,
    "cpu_adam_bytes_per_s": None,  # by the host's cores and its bandwidth
}
DEFAULT_UNUSABLE_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file's name and text: enough to say where something is wrong."""

    path: str
    text: str

    def line_of(self, table: str, key: str) -> int | None:
        """The line, counted from 1, where `key` of `[table]` stands."""
        current = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            heading = re.match(r"\s*\[([^\[\]]+)\]\s*(#|$)", line)
            if heading:
                current = heading[1].strip()
                if f"{table}.{key}".strip(".") == current:
                    return number
            elif current == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]", line):
                return number
        return None

    def fault(self, table: str, key: str, what: str, hint: str | None) -> UsageError:
        """An error that names file, line and field."""
        line = self.line_of(table, key)
        place = self.path if line is None else f"{self.path}, line {line}"
        return UsageError(f"{place}: {f'{table}.{key}'.lstrip('.')} {what}", hint)


def read_profile(path: Path) -> Hardware:
    """Hardware from a file; what is wrong with it is a UsageError with file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"{path}: no such file"
        raise UsageError(message, "`sftplan profiles` lists the built-in hardware") from None
    except UnicodeDecodeError:
        message = f"{path}: is not text in UTF-8"
        raise UsageError(message) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{path}: cannot be read: {reason}"
        raise UsageError(message) from None
    return parse_profile(text, str(path))


def parse_profile(text: str, path: str) -> Hardware:
    """Hardware from the text of a file; `path` is how errors call it."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        message = f"{path}: is not TOML: {error}"
        raise UsageError(message) from None
    return _hardware(document, _File(path=path, text=text))


def _table(document: dict[str, Any], table: str, file: _File) -> dict[str, Any]:
    """The checked values of `[table]`; of the top level where `table` is empty."""
    content = document if table == "" else document.get(table, {})
    if not isinstance(content, dict):
        error = file.fault("", table, f"must be a table: write [{table}]", None)
        raise error
    known = TABLES[table]
    figures = RATES if table == "rates" else GPU
    values = {}
    for key, value in content.items():
        if table == "" and key in TABLES and key:
            continue
        if key not in known:
            names = [*known, *(each for each in TABLES if each and table == "")]
            hint = did_you_mean(key, names) or f"fields: {', '.join(names)}"
            raise file.fault(table, key, "is no field that is known here", hint)
        fault = fault_of(value, known[key], figures)
        if fault is not None:
            shown = "" if isinstance(value, dict) else f"= {value!r} "
            raise file.fault(table, key, f"{shown}{fault[0]}", fault[1])
        values[key] = value
    for key, field in known.items():
        if field.required and key not in values:
            raise file.fault(table, key, "is missing", None)
    return values


def _hardware(document: dict[str, Any], file: _File) -> Hardware:
    top = _table(document, "", file)
    gpu = _gpu(_table(document, "gpu", file), file)
    host = _table(document, "host", file)
    return Hardware(
        name=top["name"],
        gpu=gpu,
        rates=_rates(_table(document, "rates", file)),
        gpus_per_node=top.get("gpus_per_node", 1),
        num_nodes=top.get("num_nodes", 1),
        host=Host(memory_bytes=host.get("memory_bytes"), num_cpus=host.get("num_cpus")),
        usd_per_hour=top.get("usd_per_hour"),
        price_as_of=top.get("price_as_of"),
        internode_bytes_per_s=top.get("internode_bytes_per_s"),
        notes=tuple(top.get("notes", ())),
        provenance=_provenance(_table(document, "provenance", file)),
    )


def _gpu(values: dict[str, Any], file: _File) -> Gpu:
    native = values.get("bf16_native", True)
    if values.get("bf16_flops_per_s") is None and values.get("fp16_flops_per_s") is None:
        what = "is missing, and fp16_flops_per_s too"
        error = file.fault("gpu", "bf16_flops_per_s", what, "dense, with fp32 accumulation")
        raise error
    optional = {"compute_capability", "nvlink_bytes_per_s", "tdp_w", "power_flops_per_s"}
    optional |= {f"{kind}_flops_per_s" for kind in ("bf16", "fp16", "tf32")}
    return Gpu(
        **{key: float(values[key]) if key in values else None for key in optional},
        name=values.get("name", values["nvml_name"]),
        nvml_name=values["nvml_name"],
        vendor=values.get("vendor", "nvidia"),
        architecture=values.get("architecture", "unknown"),
        memory_bytes=values["memory_bytes"],
        unusable_bytes=values.get("unusable_bytes", DEFAULT_UNUSABLE_BYTES),
        hbm_bytes_per_s=float(values["hbm_bytes_per_s"]),
        fp32_flops_per_s=float(values["fp32_flops_per_s"]),
        pcie_bytes_per_s=float(values["pcie_bytes_per_s"]),
        bf16_native=native,
    )


def _rates(values: dict[str, Any]) -> Rates:
    stated = {key: Source(source) for key, source in values.get("sources", {}).items()}
    figures: dict[str, Any] = {}
    for key, field in RATES.items():
        value = values.get(key, DEFAULT_RATES[key])
        figures[key] = value if value is None or field.kind == "integer" else float(value)
    sources = {
        key: stated.get(key, Source.ASSUMED) if key in values else Source.ASSUMED
        for key in RATES
        if figures[key] is not None
    }
    return Rates(**figures, sources=sources)


def _provenance(values: dict[str, Any]) -> Provenance:
    return Provenance(
        as_of=values.get("as_of"),
        confidence=values.get("confidence"),
        references=tuple(values.get("references", ())),
        sources={key: Source(value) for key, value in values.get("sources", {}).items()},
        unverified=tuple(values.get("unverified", ())),
        notes=tuple(values.get("notes", ())),
    )


def dump_profile(hardware: Hardware) -> str:
    """The text of a file that reads back as `hardware`.

    What other processes hold at this moment and what a cloud offers is not part of a profile.
    """
    top = {key: getattr(hardware, key) for key in TABLES[""]}
    rates = {key: getattr(hardware.rates, key) for key in RATES}
    provenance = {each.name: getattr(hardware.provenance, each.name) for each in fields(Provenance)}
    figure_sources = provenance.pop("sources")
    tables = {
        "": top,
        "gpu": {key: getattr(hardware.gpu, key) for key in GPU},
        "rates": rates,
        "rates.sources": dict(hardware.rates.sources),
        "host": {key: getattr(hardware.host, key) for key in TABLES["host"]},
        "provenance": provenance,
        "provenance.sources": figure_sources,
    }
    return "\n".join(text for name, values in tables.items() if (text := _section(name, values)))


def _section(name: str, values: dict[str, Any]) -> str:
    lines = [f"{key} = {_value(value)}" for key, value in values.items() if value not in (None, ())]
    heading = [f"[{name}]"] if name and lines else []
    return "".join(f"{line}\n" for line in heading + lines)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_value(each) for each in value)}]"
    return f"{value:_}" if isinstance(value, int) else repr(value)
