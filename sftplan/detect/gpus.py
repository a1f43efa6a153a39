"""This machine as Hardware: what NVML measures, put into the profile of the GPU that it names."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan.detect.host import detect_host
from sftplan.detect.nvml import Device, Inventory, pcie_bytes_per_s, read_inventory
from sftplan.detect.visible import hint_of, order_matters, select
from sftplan.errors import NotReadyError, UsageError
from sftplan.facts.calibration import calibrated
from sftplan.facts.hardware import Gpu, Hardware, Host, Source
from sftplan.facts.profiles import profiles_of_nvml_name
from sftplan.units import GIB, format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROOT = Path("/")
_MEMORY_TOLERANCE = 0.03  # variants of a GPU differ by far more, drivers by less than 2 %
_SLICES_PER_GPU = 7  # compute slices that MIG cuts a GPU into, Ampere to Blackwell
_C2C_BYTES_PER_S = 2e11  # a host link above this is not PCIe, whatever NVML says of its lanes
_NOT_HERE = "`--hardware NAME` plans for another machine; `sftplan profiles` lists them"

_MIG_IS_EMPTY = (
    "MIG is on and has no instance: `nvidia-smi mig -cgi` creates one, "
    "`nvidia-smi -mig 0` turns MIG off"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found, before any profile is looked up: the visible GPUs and the host."""

    driver_version: str | None
    devices: tuple[Device, ...]
    host: Host
    notes: tuple[str, ...] = ()


def detect(
    *, nvml: Any = None, environ: Mapping[str, str] | None = None, root: Path = _ROOT
) -> Hardware:
    """This machine's visible GPUs and its host.

    A machine without a usable GPU is a NotReadyError, a GPU without a profile a UsageError.
    """
    return hardware_of(find_machine(nvml=nvml, environ=environ, root=root))


def find_machine(
    *, nvml: Any = None, environ: Mapping[str, str] | None = None, root: Path = _ROOT
) -> Machine:
    """The GPUs that CUDA would show this process, and the host, without looking up profiles."""
    inventory = read_inventory(nvml)
    devices, notes = _visible(inventory, os.environ if environ is None else environ)
    return Machine(
        driver_version=inventory.driver_version,
        devices=devices,
        host=detect_host(root),
        notes=notes,
    )


def _visible(
    inventory: Inventory, environ: Mapping[str, str]
) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    if not inventory.gpus:
        message = "the NVIDIA driver sees no GPU"
        raise NotReadyError(message, f"in a container: run it with --gpus all; {_NOT_HERE}")
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return _unrestricted(inventory)
    pool = [*inventory.gpus, *inventory.slices]
    selection = select(
        text, [gpu.uuid for gpu in inventory.gpus], [each.uuid for each in inventory.slices]
    )
    chosen = [_first_slice(inventory, pool[place]) for place in selection.positions]
    devices = tuple(device for device in chosen if device is not None)
    if not devices:
        message = "CUDA_VISIBLE_DEVICES leaves no GPU visible"
        why = _MIG_IS_EMPTY if selection.positions else hint_of(text, selection)
        raise NotReadyError(message, f"{why}; {_NOT_HERE}")
    notes = [f"CUDA_VISIBLE_DEVICES={text} shows {len(devices)} of {len(inventory.gpus)} GPUs"]
    if selection.stopped_at is not None:
        notes.append(f"CUDA ignores {selection.stopped_at!r} in it, no GPU here, and what follows")
    if order_matters(environ, selection, mixed=len({gpu.name for gpu in inventory.gpus}) > 1):
        notes.append("CUDA may count mixed GPUs in another order: set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    kept, more = _one_slice(devices)
    return kept, (*notes, *more)


def _unrestricted(inventory: Inventory) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    whole = tuple(gpu for gpu in inventory.gpus if gpu.uuid not in inventory.partitioned)
    if whole:
        cut = len(inventory.gpus) - len(whole)
        notes = (
            (f"{cut} GPUs in MIG mode are left out: CUDA shows whole GPUs first",) if cut else ()
        )
        return whole, notes
    if not inventory.slices:
        message = "no GPU is visible"
        raise NotReadyError(message, f"{_MIG_IS_EMPTY}; {_NOT_HERE}")
    return _one_slice(inventory.slices)


def _first_slice(inventory: Inventory, device: Device) -> Device | None:
    """The device itself; of a GPU that MIG cuts up, a slice, and None where there is none."""
    if device.uuid not in inventory.partitioned:
        return device
    own = [each for each in inventory.slices if each.parent_uuid == device.uuid]
    return own[0] if own else None


def _one_slice(devices: tuple[Device, ...]) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """One MIG slice at most: CUDA shows a process no more."""
    slices = tuple(device for device in devices if device.parent_uuid is not None)
    if not slices:
        return devices, ()
    note = f"a MIG slice of {format_gib(slices[0].memory_bytes)} GiB ({slices[0].uuid})"
    if len(devices) > 1:
        note += f"; CUDA shows a process one slice, so {len(devices) - 1} more are left out"
    return slices[:1], (note,)


def hardware_of(machine: Machine) -> Hardware:
    """The machine as Hardware; unknown GPUs are a UsageError that tells how to describe them."""
    devices = machine.devices
    least = min(devices, key=lambda device: device.memory_bytes)
    profile = profile_of(least)
    notes = [*machine.notes, *profile.notes]
    names = sorted({f"{each.name} ({format_gib(each.memory_bytes)} GiB)" for each in devices})
    if len(names) > 1:
        notes.append(
            f"mixed GPUs, {', '.join(names)}: planned as {len(devices)} of the smallest; "
            "CUDA_VISIBLE_DEVICES picks equal ones"
        )
    gpu, more = _measured_gpu(profile.gpu, least, len(devices))
    rates = profile.rates
    if least.reserved_bytes is not None:
        sources = {**rates.sources, "device_bytes": Source.MEASURED}
        rates = replace(rates, device_bytes=least.reserved_bytes, sources=sources)
    found = replace(
        profile,
        name=f"{profile.name}-mig" if least.parent_uuid else profile.name,
        gpu=gpu,
        rates=rates,
        gpus_per_node=len(devices),
        host=machine.host,
        memory_taken_bytes=_taken_bytes(devices, rates.device_bytes),
        notes=(*notes, *more),
    )
    return calibrated(found)


def profile_of(device: Device) -> Hardware:
    """The profile with the device's NVML name; its memory tells variants apart."""
    known = profiles_of_nvml_name(device.name)
    if known and device.parent_uuid is not None:
        return known[0]
    for profile in known:
        total = profile.gpu.memory_bytes
        if abs(device.memory_bytes - total) <= _MEMORY_TOLERANCE * total:
            return profile
    described = f"{device.name!r} with {format_gib(device.memory_bytes)} GiB"
    variants = ", ".join(f"{each.name} has {format_gib(each.gpu.memory_bytes)}" for each in known)
    message = f"no profile for {described}" + (f"; {variants}" if variants else "")
    hint = (
        "`sftplan detect --save FILE` writes what NVML tells; add its rates, then --hardware FILE"
    )
    raise UsageError(message, hint)


def _taken_bytes(devices: tuple[Device, ...], device_bytes: int) -> int:
    """Bytes that other processes leave missing on the GPU with the least room.

    In terms of the smallest GPU, so that mixed ones are judged by what is free on each.
    """
    least = min(device.memory_bytes for device in devices)
    free = []
    for device in devices:
        # Without the driver's own share apart, an idle device shows it as taken.
        own = device_bytes if device.reserved_bytes is None else 0
        free.append(device.memory_bytes - max(0, device.taken_bytes - own))
    return max(0, least - min(free))


def _measured_gpu(gpu: Gpu, device: Device, num_gpus: int) -> tuple[Gpu, list[str]]:
    """The profile's GPU with what NVML knows better, and notes on what differs."""
    notes = []
    changes: dict[str, Any] = {"memory_bytes": device.memory_bytes}
    if device.reserved_bytes is not None:
        changes["unusable_bytes"] = device.reserved_bytes
    slot = pcie_bytes_per_s(device)
    is_pcie = gpu.pcie_bytes_per_s < _C2C_BYTES_PER_S
    if slot is not None and is_pcie and slot < 0.97 * gpu.pcie_bytes_per_s:
        changes["pcie_bytes_per_s"] = slot
        notes.append(
            f"PCIe {device.pcie_generation} x{device.pcie_lanes} in this machine: "
            f"{slot / 1e9:.1f} of the GPU's {gpu.pcie_bytes_per_s / 1e9:.1f} GB/s"
        )
    if device.nvlink_active is False and gpu.nvlink_bytes_per_s and num_gpus > 1:
        changes["nvlink_bytes_per_s"] = None
        notes.append("no NVLink is active between these GPUs: planned with PCIe")
    if device.nvlink_active and gpu.nvlink_bytes_per_s is None:
        notes.append(
            "an NVLink is active that the profile does not count; a file can state its rate"
        )
    if device.parent_uuid is not None:
        return _slice(replace(gpu, **changes), gpu, device), notes
    return replace(gpu, **changes), notes


def _slice(gpu: Gpu, whole: Gpu, device: Device) -> Gpu:
    """The rates of a MIG slice: bandwidth by its share of the memory, products by its slices."""
    share = min(1.0, device.memory_bytes / whole.memory_bytes)
    slices = device.num_slices
    compute = share if slices is None else min(1.0, slices / _SLICES_PER_GPU)

    def scaled(rate: float | None) -> float | None:
        return None if rate is None else rate * compute

    return replace(
        gpu,
        name=f"{whole.name}, MIG slice of {device.memory_bytes / GIB:.0f} GiB",
        unusable_bytes=device.reserved_bytes or 0,
        hbm_bytes_per_s=whole.hbm_bytes_per_s * share,
        bf16_flops_per_s=scaled(whole.bf16_flops_per_s),
        fp16_flops_per_s=scaled(whole.fp16_flops_per_s),
        tf32_flops_per_s=scaled(whole.tf32_flops_per_s),
        fp32_flops_per_s=whole.fp32_flops_per_s * compute,
        nvlink_bytes_per_s=None,
    )
