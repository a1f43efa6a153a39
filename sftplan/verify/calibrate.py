"""Calibration: rates measured on this machine, kept for the next plan, and refined by every dry run."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan.detect.gpus import find_machine, hardware_of
from sftplan.errors import UsageError
from sftplan.facts.calibration import (
    Calibration,
    Observation,
    Product,
    calibration_file,
    read_calibration,
)
from sftplan.facts.folders import FOLDER_VARIABLE
from sftplan.plan.file import document, plan_sha256, write_text
from sftplan.train.launch import versions
from sftplan.verify.calibrate_child import SETTINGS
from sftplan.verify.fit import fitted_rates, graphs_of
from sftplan.verify.processes import run_processes

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware
    from sftplan.plan.record import Plan

TIMEOUT_S = 180.0  # it takes well under 60
MAX_OBSERVATIONS = 64  # the newest ones; an old driver's are not worth keeping


def calibrate() -> tuple[Calibration, Path]:
    """Measure this machine's first GPU and its host, and keep what was found.

    Raises:
        NotReadyError: There is no GPU.
        UsageError: Nobody knows the GPU, or the folder cannot be written.
    """
    machine = find_machine()
    hardware = hardware_of(machine)
    found = measured_rates(cpu=False)
    known = _known(hardware)
    made = calibration_of(
        found, hardware, driver=machine.driver_version,
        observations=[] if known is None else known.observations,
    )  # fmt: skip
    return made, write_calibration(made)


def measured_rates(*, cpu: bool) -> dict[str, Any]:
    """What a fresh process measures, in base units."""
    with tempfile.TemporaryDirectory(prefix="sftplan-calibrate-") as name:
        folder = Path(name)
        (folder / SETTINGS).write_text(json.dumps({"cpu": cpu}), encoding="utf-8")
        module = "sftplan.verify.calibrate_child"
        return run_processes(folder, 1, module=module, timeout_s=TIMEOUT_S)[0]


def calibration_of(
    found: dict[str, Any],
    hardware: Hardware,
    *,
    driver: str | None,
    observations: list[Observation],
) -> Calibration:
    """The shares of the datasheet, and what explains the dry runs so far."""
    gpu = hardware.gpu
    measured: dict[str, float] = {
        "hbm_fraction": found["hbm_bytes_per_s"] / gpu.hbm_bytes_per_s,
        "dispatch_scale": found["dispatch_scale"],
        "host_bytes_per_s": found["host_bytes_per_s"],
        "cpu_adam_bytes_per_s": found["cpu_adam_bytes_per_s"],
    }
    large = found["large"]
    if gpu.bf16_flops_per_s and "bfloat16" in large:
        measured["matmul_fraction"] = large["bfloat16"] / gpu.bf16_flops_per_s
    elif gpu.fp16_flops_per_s and "float16" in large:
        measured["matmul_fraction"] = large["float16"] / gpu.fp16_flops_per_s
    if found["link_bytes_per_s"] is not None:
        measured["pcie_fraction"] = found["link_bytes_per_s"] / gpu.pcie_bytes_per_s
    if found["context_bytes"] is not None:
        measured["context_bytes"] = found["context_bytes"]
    made = Calibration(
        gpu=gpu.nvml_name,
        memory_bytes=gpu.memory_bytes,
        measured_at=_today(),
        driver=driver,
        versions=dict(versions()),
        measured=measured,
        products=[Product(**product) for product in found["products"]],
        observations=observations,
    )
    return dataclasses.replace(made, fitted=fitted_rates(made, hardware))


def learn(plan: Plan, found: dict[str, Any]) -> Path | None:
    """Keep what a dry run on this machine's GPU measured; None where there is nothing to learn."""
    if found.get("out_of_memory") or found.get("taken_meanwhile_bytes") or not found.get("step_s"):
        return None
    machine = find_machine()
    hardware = hardware_of(machine)
    known = _known(hardware) or Calibration(
        gpu=hardware.gpu.nvml_name,
        memory_bytes=hardware.gpu.memory_bytes,
        measured_at=_today(),
        driver=machine.driver_version,
        versions=dict(versions()),
        measured={},
    )
    new = observation_of(plan, found)
    others = [old for old in known.observations if old.plan_sha256 != new.plan_sha256]
    observations = [*others, new][-MAX_OBSERVATIONS:]
    made = dataclasses.replace(
        known, measured_at=_today(), driver=machine.driver_version, versions=dict(versions())
    )
    return write_calibration(with_observations(made, observations, hardware))


def with_observations(
    known: Calibration, observations: list[Observation], hardware: Hardware
) -> Calibration:
    """A calibration that these dry runs have refined."""
    measured = known.measured | _context(observations) | _host(observations)
    made = dataclasses.replace(known, observations=observations, measured=measured)
    return dataclasses.replace(made, fitted=fitted_rates(made, hardware))


def _context(observations: list[Observation]) -> dict[str, float]:
    """What lies outside the allocator's reserve in real steps: more kernels than a small one loads.

    Without what CUDA graphs take.
    """
    sizes = [each.outside_bytes - graphs_of(each) for each in observations if each.outside_bytes]
    return {"context_bytes": float(statistics.median(sizes))} if sizes else {}


def _host(observations: list[Observation]) -> dict[str, float]:
    """The host as it mostly was: within minutes it may be twice as slow."""
    scales = [each.host_scale for each in observations if each.host_scale]
    return {"dispatch_scale": statistics.median(scales)} if scales else {}


def observation_of(plan: Plan, found: dict[str, Any]) -> Observation:
    """What of a plan and its dry run is needed to predict the step again with other rates."""
    strategy: Any = document(plan.strategy)
    workload: Any = document(plan.inputs.workload)
    model = plan.inputs.model
    return Observation(
        plan_sha256=plan_sha256(plan),
        measured_at=_today(),
        model=model.name if model.source == "builtin" else model.source,
        strategy={name: value for name, value in strategy.items() if name != "pinned"},
        workload=workload,
        step_s=found["step_s"],
        predicted_s=plan.time.step_s,
        outside_bytes=found.get("outside_bytes"),
        host_scale=found.get("host_scale"),
    )


def write_calibration(made: Calibration) -> Path:
    """Write it into the user's folder, whole or not at all.

    Raises:
        UsageError: There is no such folder, or it cannot be written.
    """
    path = calibration_file(made.gpu)
    if path is None:
        message = "there is no home folder to keep the calibration in"
        raise UsageError(message, f"{FOLDER_VARIABLE} names another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot make {path.parent}: {error.strerror or error}"
        raise UsageError(message, f"{FOLDER_VARIABLE} names another folder") from None
    write_text(json.dumps(document(made), indent=2, ensure_ascii=False) + "\n", path)
    return path


def _known(hardware: Hardware) -> Calibration | None:
    path = calibration_file(hardware.gpu.nvml_name)
    return read_calibration(path) if path is not None and path.is_file() else None


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
