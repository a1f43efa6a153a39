"""What was measured on a machine's own GPU: rates that take the place of its profile's.

A calibration belongs to a machine, so it lies in the user's configuration folder, as
`calibrations/GPU.json`. What this machine detects and the profile of that GPU take it; a cloud's
offer, which is another machine, does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError
from sftplan.facts.folders import config_folder
from sftplan.facts.hardware import Source

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.facts.hardware import Hardware

FORMAT = "sftplan.calibration"
FORMAT_VERSION = "1.0"
FITTED = ("matmul_fraction", "hbm_fraction", "dispatch_scale", "compiled_dispatch_scale")
CALIBRATED = (*FITTED, "context_bytes", "pcie_fraction", "host_bytes_per_s", "cpu_adam_bytes_per_s")
MEMORY_TOLERANCE_FRACTION = 0.03  # variants of a GPU differ by more, and so do slices of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A matrix product (m, k)·(k, n) and the rate that it reached."""

    dtype: str
    m: int
    n: int
    k: int
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A dry run: the step that it measured, and how long that took; `plan_sha256` tells it apart.

    `host_scale` is what the host took for operations just then, as `Rates.dispatch_scale`.
    """

    plan_sha256: str
    measured_at: str
    model: str
    strategy: dict[str, Any]
    workload: dict[str, Any]
    step_s: float
    predicted_s: float | None  # by the plan
    outside_bytes: int | None = None
    host_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`measured` are rates from kernels, `fitted` those that explain the steps of dry runs best."""

    format: str = FORMAT
    format_version: str = FORMAT_VERSION
    gpu: str  # as NVML calls it
    memory_bytes: int
    measured_at: str  # date, UTC
    driver: str | None
    versions: dict[str, str | None]
    measured: dict[str, float]
    fitted: dict[str, float] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)

    @property
    def rates(self) -> dict[str, float]:
        """What replaces fields of `Rates`."""
        return {k: v for k, v in (self.measured | self.fitted).items() if k in CALIBRATED}


def calibration_file(nvml_name: str) -> Path | None:
    """Where the calibration of a GPU is, or would be; None where there is no folder for it."""
    folder = config_folder()
    return None if folder is None else folder / "calibrations" / f"{slug(nvml_name)}.json"


def slug(nvml_name: str) -> str:
    """A GPU's name as a file's.

    >>> slug("NVIDIA GeForce RTX 4090")
    'geforce-rtx-4090'
    """
    bare = nvml_name.removeprefix("NVIDIA ").strip().lower()
    return re.sub(r"[^a-z0-9]+", "-", bare).strip("-") or "gpu"


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        UsageError: It is none, or of another version.
    """
    from pydantic import TypeAdapter, ValidationError

    hint = f"`sftplan detect --calibrate` measures anew; without {path} the profile's rates hold"
    try:
        found = TypeAdapter(Calibration).validate_json(path.read_bytes())
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror or error}"
        raise UsageError(message, hint) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        message = f"{path}: {where or 'the file'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UsageError(message, hint) from None
    if found.format != FORMAT or found.format_version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        message = f"{path}: {found.format} {found.format_version}, this sftplan reads {FORMAT} {FORMAT_VERSION}"
        raise UsageError(message, hint)
    wrong = [k for k, v in found.rates.items() if not 0 < v < float("inf")]
    if wrong:
        message = f"{path}: {wrong[0]} = {found.rates[wrong[0]]} is no rate"
        raise UsageError(message, hint)
    return found


def calibrated(hardware: Hardware) -> Hardware:
    """The hardware with what was measured on such a GPU of this machine, if anything was."""
    path = calibration_file(hardware.gpu.nvml_name)
    if path is None or not path.is_file():
        return hardware
    found = read_calibration(path)
    size = hardware.gpu.memory_bytes
    if abs(found.memory_bytes - size) > MEMORY_TOLERANCE_FRACTION * size:
        return hardware
    return with_rates(hardware, found, where=str(path))


def with_rates(hardware: Hardware, found: Calibration, *, where: str) -> Hardware:
    """The hardware with a calibration's rates, and the words for where they are from."""
    rates: dict[str, Any] = dict(found.rates)
    if "context_bytes" in rates:
        rates["context_bytes"] = round(rates["context_bytes"])
    sources = {**hardware.rates.sources, **dict.fromkeys(rates, Source.MEASURED)}
    torch = found.versions.get("torch") or "unknown"
    steps = f", {len(found.observations)} dry runs" if found.observations else ""
    words = (
        f"{found.measured_at}, driver {found.driver or 'unknown'}, torch {torch}{steps}: {where}"
    )
    return replace(
        hardware, rates=replace(hardware.rates, **rates, sources=sources), calibration=words
    )
