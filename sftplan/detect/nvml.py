"""What NVML tells of this machine's GPUs. Nothing here runs a kernel or creates a context."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftplan.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ELSEWHERE = "`--hardware NAME` plans for another machine; `sftplan profiles` lists them"
# One direction, by generation, after line coding.
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.877e9}
_NVLINK_MAX_LINKS = 18
_MAX_SLICES = 64  # of one GPU; a driver that answers nonsense must not keep us

# By the name of pynvml's exception class: what it means, and what to do.
_CAUSES = {
    "LibraryNotFound": ("no NVIDIA driver is installed",
        "install the NVIDIA driver (in a container: run it with --gpus all)"),
    "DriverNotLoaded": ("the NVIDIA driver is installed but not loaded",
        "load it with `sudo modprobe nvidia`, or reboot after an installation"),
    "LibRmVersionMismatch": ("the NVIDIA driver and its library differ in version",
        "the driver was updated while it was loaded: reboot"),
    "NoPermission": ("no permission to ask the NVIDIA driver",
        "check the rights of /dev/nvidia*; in a container: run it with --gpus all"),
    "GpuIsLost": ("a GPU has fallen off the bus", "reboot; `dmesg | grep Xid` tells more"),
    "ResetRequired": ("a GPU needs a reset", "`sudo nvidia-smi --gpu-reset`, or reboot"),
    "CorruptedInforom": ("a GPU reports a corrupted infoROM", "the card may need service"),
    "FunctionNotFound": ("the NVIDIA driver is too old", "update the driver"),
    "Timeout": ("the NVIDIA driver does not answer", "`nvidia-smi` tells whether it hangs"),
    "IrqIssue": ("a GPU has an interrupt problem", "check its seat and power, then reboot"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU or one MIG slice of it. What NVML does not tell is None."""

    uuid: str
    name: str
    memory_bytes: int
    taken_bytes: int  # by processes
    reserved_bytes: int | None = None  # by the driver itself; CUDA's total is less by this
    compute_capability: float | None = None
    num_multiprocessors: int | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    nvlink_active: bool | None = None
    parent_uuid: str | None = None  # of a MIG slice: its GPU
    num_slices: int | None = None  # of a MIG slice: how many of the seven


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All GPUs by NVML's index, their MIG slices, and which GPUs MIG cuts up."""

    driver_version: str | None
    gpus: tuple[Device, ...]
    slices: tuple[Device, ...] = ()
    partitioned: tuple[str, ...] = ()  # UUIDs of GPUs


def pcie_bytes_per_s(device: Device) -> float | None:
    """What the device's slot carries in one direction; None where NVML does not tell."""
    lane = _LANE_BYTES_PER_S.get(device.pcie_generation or 0)
    return lane * device.pcie_lanes if lane is not None and device.pcie_lanes else None


def read_inventory(nvml: Any = None) -> Inventory:
    """Every GPU and MIG slice; what stands in the way is a NotReadyError that names it."""
    if nvml is None:
        nvml = _import_nvml()
    with _session(nvml):
        return _inventory(nvml)


def read_driver_version(nvml: Any = None) -> str | None:
    """The driver's version, or None without a driver."""
    try:
        return read_inventory(nvml).driver_version
    except NotReadyError:
        return None


def _import_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        message = "the Python binding of NVML is not installed"
        raise NotReadyError(message, "`pip install nvidia-ml-py`") from None


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError, OSError, AttributeError) as error:
        raise _not_ready(error) from None
    try:
        yield
    except nvml.NVMLError as error:
        raise _not_ready(error) from None
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _not_ready(error: Exception, where: str = "") -> NotReadyError:
    kind = type(error).__name__.removeprefix("NVMLError_")
    if isinstance(error, OSError):
        kind = "LibraryNotFound"
    cause, remedy = _CAUSES.get(kind, (f"NVML reports: {error}", "`nvidia-smi` may tell more"))
    return NotReadyError(f"{where}{cause}", f"{remedy}; {_ELSEWHERE}")


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU or driver does not know."""
    try:
        return function(*arguments)
    except (nvml.NVMLError, AttributeError, OSError, UnicodeDecodeError):
        return None


def _inventory(nvml: Any) -> Inventory:
    gpus, slices, partitioned = [], [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
            is_cut = bool(mode) and mode[0] == 1
            gpus.append(_gpu(nvml, handle, is_cut=is_cut))
        except nvml.NVMLError as error:
            raise _not_ready(error, f"GPU {index}: ") from None
        if is_cut:
            partitioned.append(gpus[-1].uuid)
            slices += _slices(nvml, handle, gpus[-1])
    return Inventory(
        driver_version=_text(_ask(nvml, nvml.nvmlSystemGetDriverVersion)),
        gpus=tuple(gpus),
        slices=tuple(slices),
        partitioned=tuple(partitioned),
    )


def _gpu(nvml: Any, handle: Any, *, is_cut: bool) -> Device:
    # Of a GPU that MIG cuts up, memory may be forbidden; nobody can use it whole anyway.
    memory = (0, 0, None) if is_cut else _memory(nvml, handle)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    attributes = _ask(nvml, nvml.nvmlDeviceGetAttributes_v2, handle)
    return Device(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)) or "",
        name=_text(nvml.nvmlDeviceGetName(handle)) or "",
        memory_bytes=memory[0],
        taken_bytes=memory[1],
        reserved_bytes=memory[2],
        compute_capability=float(f"{capability[0]}.{capability[1]}") if capability else None,
        num_multiprocessors=getattr(attributes, "multiprocessorCount", None),
        # The current generation drops on an idle GPU; the maximum is of this GPU in this slot.
        pcie_generation=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_lanes=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        nvlink_active=_nvlink_active(nvml, handle),
    )  # fmt: skip


def _memory(nvml: Any, handle: Any) -> tuple[int, int, int | None]:
    """Total, taken by processes, and held by the driver itself (None on old drivers)."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    detailed = None
    if version is not None:
        detailed = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, version)
    if detailed is not None:
        return int(detailed.total), int(detailed.used), int(detailed.reserved)
    plain = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(plain.total), int(plain.used), None


def _nvlink_active(nvml: Any, handle: Any) -> bool | None:
    states = []
    for link in range(_NVLINK_MAX_LINKS):
        state = _ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:
            break
        states.append(state)
    return any(states) if states else None


def _slices(nvml: Any, handle: Any, parent: Device) -> list[Device]:
    found = []
    for index in range(
        min(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0, _MAX_SLICES)
    ):
        child = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if child is None:  # the slots are not filled in order
            continue
        total, taken, reserved = _memory(nvml, child)
        attributes = _ask(nvml, nvml.nvmlDeviceGetAttributes_v2, child)
        found.append(
            Device(
                uuid=_text(nvml.nvmlDeviceGetUUID(child)) or "",
                name=parent.name,
                memory_bytes=total,
                taken_bytes=taken,
                reserved_bytes=reserved,
                compute_capability=parent.compute_capability,
                num_multiprocessors=getattr(attributes, "multiprocessorCount", None),
                pcie_generation=parent.pcie_generation,
                pcie_lanes=parent.pcie_lanes,
                parent_uuid=parent.uuid,
                num_slices=getattr(attributes, "gpuInstanceSliceCount", None),
            )
        )
    return found


def _text(value: Any) -> str | None:
    """Text of an answer; older bindings give bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else None
