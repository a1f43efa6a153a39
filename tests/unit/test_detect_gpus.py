"""What detection makes of a machine, told by an NVML in memory, with its failures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from sftplan.detect.gpus import detect, find_machine
from sftplan.detect.nvml import read_driver_version, read_inventory
from sftplan.detect.skeleton import skeleton
from sftplan.errors import ExitCode, NotReadyError, UsageError
from sftplan.facts.hardware import Hardware, Source
from sftplan.facts.profile_file import dump_profile, parse_profile

MIB = 2**20
H200_RESERVED = 644_939_776


@dataclass(kw_only=True)
class FakeGpu:
    """One GPU or MIG slice. `failing` gives a function's name the NVML error that it raises."""

    name: str = "NVIDIA H200"
    uuid: str = "GPU-6f812670"
    memory: int = 143_771 * MIB
    used: int = 0
    reserved: int = H200_RESERVED
    pcie: tuple[int, int] = (5, 16)
    nvlink: tuple[int, ...] = ()
    mig: list[FakeGpu | None] | None = None
    slices: int | None = None
    failing: dict[str, int] = field(default_factory=dict)


class FakeNvml:
    """pynvml as far as detection calls it; `v2`: the driver tells its own memory apart."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *gpus: FakeGpu, v2: bool = True, init_error: int | None = None) -> None:
        self.gpus, self.v2, self.init_error = gpus, v2, init_error
        self.num_shutdowns = 0

    def __getattr__(self, name: str) -> Any:
        if name == "nvmlMemory_v2" and self.v2:
            return 2
        function = getattr(type(self), f"_{name}", None)
        if function is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            for argument in arguments:
                if isinstance(argument, FakeGpu) and name in argument.failing:
                    raise pynvml.NVMLError(argument.failing[name])
            return function(self, *arguments)

        return call

    def _nvmlInit(self) -> None:  # noqa: N802 - pynvml's names
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)

    def _nvmlShutdown(self) -> None:  # noqa: N802
        self.num_shutdowns += 1

    def _nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802 - old bindings give bytes
        return b"580.159.04"

    def _nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        if "nvmlDeviceGetHandleByIndex" in self.gpus[index].failing:
            raise pynvml.NVMLError(self.gpus[index].failing["nvmlDeviceGetHandleByIndex"])
        return self.gpus[index]

    def _nvmlDeviceGetName(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.name

    def _nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return gpu.uuid

    def _nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> Any:  # noqa: N802
        if version is None:  # the first version counts the driver's own as used
            return SimpleNamespace(total=gpu.memory, used=gpu.used + gpu.reserved)
        return SimpleNamespace(total=gpu.memory, used=gpu.used, reserved=gpu.reserved)

    def _nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        return (9, 0)

    def _nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: FakeGpu) -> int:  # noqa: N802
        return gpu.pcie[0]

    def _nvmlDeviceGetMaxPcieLinkWidth(self, gpu: FakeGpu) -> int:  # noqa: N802
        return gpu.pcie[1]

    def _nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:  # noqa: N802
        if link >= len(gpu.nvlink):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu.nvlink[link]

    def _nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:  # noqa: N802
        return [0, 0] if gpu.mig is None else [1, 1]

    def _nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:  # noqa: N802
        return len(gpu.mig or [])

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: int) -> FakeGpu:  # noqa: N802
        child = (gpu.mig or [])[index]
        if child is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return child

    def _nvmlDeviceGetAttributes_v2(self, gpu: FakeGpu) -> Any:  # noqa: N802
        if gpu.slices is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(multiprocessorCount=14, gpuInstanceSliceCount=gpu.slices)


def gpus(count: int, **changes: Any) -> list[FakeGpu]:
    return [FakeGpu(uuid=f"GPU-{index:04x}", **changes) for index in range(count)]


def found(*devices: FakeGpu, visible: str | None = None, v2: bool = True) -> Hardware:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return detect(nvml=FakeNvml(*devices, v2=v2), environ=environ)


def mig_gpu(*slices: FakeGpu | None) -> FakeGpu:
    forbidden = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NO_PERMISSION}
    name, memory = "NVIDIA A100-SXM4-40GB", 40_960 * MIB
    return FakeGpu(name=name, uuid="GPU-a", memory=memory, mig=list(slices), failing=forbidden)


SLICE = FakeGpu(uuid="MIG-1", memory=4_864 * MIB, reserved=0, slices=1)


def test_one_idle_h200() -> None:
    nvml = FakeNvml(FakeGpu())
    hardware = detect(nvml=nvml, environ={})
    assert (hardware.name, hardware.num_gpus) == ("h200-sxm", 1)
    assert hardware.gpu.memory_bytes == 150_754_820_096
    assert hardware.gpu.unusable_bytes == hardware.rates.device_bytes == H200_RESERVED
    assert hardware.rates.sources["device_bytes"] is Source.MEASURED
    assert hardware.memory_taken_bytes == 0
    assert hardware.notes == ()
    assert hardware.host.memory_bytes
    assert nvml.num_shutdowns == 1


def test_a_saved_detection_loads_again() -> None:
    hardware = found(*gpus(4, used=3_000))
    saved = parse_profile(dump_profile(hardware), "here.toml")
    assert saved == replace(hardware, memory_taken_bytes=0)


@pytest.mark.parametrize("v2", [True, False])
def test_memory_that_others_hold_counts_on_the_fullest_gpu(v2: bool) -> None:
    devices = gpus(4)
    devices[2].used = 5_000 * MIB
    assert found(*devices, v2=v2).memory_taken_bytes == 5_000 * MIB


def test_mixed_gpus_are_planned_as_the_smallest() -> None:
    small = FakeGpu(name="NVIDIA L4", uuid="GPU-b", memory=23_034 * MIB, reserved=0)
    hardware = found(FakeGpu(used=4_096 * MIB), small)
    assert (hardware.name, hardware.gpus_per_node) == ("l4", 2)
    assert hardware.memory_taken_bytes == 0  # what is free on the big one exceeds the small one
    assert any("mixed GPUs, NVIDIA H200" in note for note in hardware.notes)
    by_index = found(FakeGpu(), small, visible="0")
    assert any("CUDA_DEVICE_ORDER" in note for note in by_index.notes)


def test_a_variant_is_told_apart_by_its_memory() -> None:
    with pytest.raises(UsageError, match=r"rtx-3060-12gb has 12\.00") as caught:
        found(FakeGpu(name="NVIDIA GeForce RTX 3060", memory=8_192 * MIB))
    assert "--save FILE" in (caught.value.hint or "")
    older = FakeGpu(name="A100-SXM4-80GB", memory=81_251 * MIB, pcie=(4, 16))
    assert found(older).name == "a100-80gb-sxm"


def test_an_unknown_gpu_gets_a_skeleton_that_names_its_gaps() -> None:
    device = FakeGpu(name="NVIDIA X900", pcie=(5, 8))
    with pytest.raises(UsageError, match=r"no profile for 'NVIDIA X900' with 140\.40 GiB"):
        found(device)
    text = skeleton(find_machine(nvml=FakeNvml(device), environ={}), "x900")
    with pytest.raises(UsageError, match="hbm_bytes_per_s is missing"):
        parse_profile(text, "x900.toml")
    filled = text.replace("# hbm_", "hbm_").replace("# bf16_", "bf16_").replace("# fp32_", "fp32_")
    hardware = parse_profile(filled, "x900.toml")
    assert hardware.gpu.pcie_bytes_per_s == pytest.approx(31.5e9, rel=1e-3)
    assert hardware.gpu.unusable_bytes == H200_RESERVED


def test_a_narrow_slot_and_a_dead_nvlink_are_noticed() -> None:
    hardware = found(*gpus(2, pcie=(4, 8), nvlink=(0, 0)))
    assert hardware.gpu.pcie_bytes_per_s == pytest.approx(15.75e9, rel=1e-3)
    assert hardware.gpu.nvlink_bytes_per_s is None
    assert any("PCIe 4 x8" in note for note in hardware.notes)
    assert found(*gpus(2, nvlink=(1, 1))).gpu.nvlink_bytes_per_s == 450e9


def test_a_mig_slice_has_its_own_memory_and_its_share_of_the_rates() -> None:
    hardware = found(mig_gpu(None, SLICE, replace(SLICE, uuid="MIG-2")), visible="MIG-2")
    assert hardware.name == "a100-40gb-sxm-mig"
    assert hardware.gpus_per_node == 1
    assert hardware.gpu.memory_bytes == 4_864 * MIB
    assert hardware.gpu.bf16_flops_per_s == pytest.approx(312e12 / 7)
    assert hardware.gpu.hbm_bytes_per_s == pytest.approx(1.555e12 * 4_864 / 40_960)
    assert hardware.gpu.nvlink_bytes_per_s is None


def test_cuda_shows_one_mig_slice_and_whole_gpus_first() -> None:
    cut = mig_gpu(SLICE, replace(SLICE, uuid="MIG-2"))
    alone = found(cut)
    assert alone.gpus_per_node == 1
    assert any("1 more are left out" in note for note in alone.notes)
    assert found(cut, visible="0").name == "a100-40gb-sxm-mig"
    assert found(FakeGpu(), cut).name == "h200-sxm"
    for visible in (None, "0"):
        with pytest.raises(NotReadyError, match="visible") as caught:
            found(mig_gpu(None), visible=visible)
        assert "MIG is on" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0,2", 2), ("GPU-0001", 1), ("GPU-0001,GPU-0003", 2), ("0,-1,1", 1), ("0,1,9,2", 2)],
)
def test_cuda_visible_devices(visible: str, count: int) -> None:
    hardware = found(*gpus(4), visible=visible)
    assert hardware.gpus_per_node == count
    assert f"CUDA_VISIBLE_DEVICES={visible} shows {count} of 4 GPUs" in hardware.notes


@pytest.mark.parametrize(
    ("visible", "hint"),
    [("", "is empty"), ("-1", "'-1' is no GPU"), ("7", "'7' is no GPU"), ("1,1", "twice"),
     ("GPU-", "is no GPU"), ("none", "'none' is no GPU"), ("GPU-00", "'GPU-00' is no GPU")],
)  # fmt: skip
def test_cuda_visible_devices_that_hides_everything(visible: str, hint: str) -> None:
    with pytest.raises(NotReadyError, match="leaves no GPU visible") as caught:
        found(*gpus(4), visible=visible)
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == ExitCode.NOT_READY


def test_no_gpu() -> None:
    with pytest.raises(NotReadyError, match="sees no GPU"):
        found()


@pytest.mark.parametrize("code", [*range(1, 30), pynvml.NVML_ERROR_UNKNOWN])
def test_every_nvml_error_is_a_message(code: int) -> None:
    with pytest.raises(NotReadyError) as caught:
        detect(nvml=FakeNvml(init_error=code), environ={})
    assert "--hardware NAME" in (caught.value.hint or "")
    for function in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"):
        if function == "nvmlDeviceGetMemoryInfo" and code == pynvml.NVML_ERROR_UNKNOWN:
            continue
        with pytest.raises(NotReadyError, match=r"GPU 1: "):
            found(FakeGpu(), FakeGpu(failing={function: code}))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "differ in version"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "no permission"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "fallen off the bus"),
    ],
)
def test_what_stands_in_the_way_is_named(code: int, message: str) -> None:
    with pytest.raises(NotReadyError, match=message):
        read_inventory(FakeNvml(init_error=code))
    assert read_driver_version(FakeNvml(init_error=code)) is None


def test_what_nvml_cannot_tell_stays_unknown() -> None:
    functions = [
        "nvmlDeviceGetMigMode", "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth",
    ]  # fmt: skip
    failing = dict.fromkeys(functions, pynvml.NVML_ERROR_NOT_SUPPORTED)
    device = read_inventory(FakeNvml(FakeGpu(failing=failing))).gpus[0]
    assert device.compute_capability is device.pcie_lanes is device.nvlink_active is None
    assert found(FakeGpu(failing=failing)).gpu.pcie_bytes_per_s == 63e9
