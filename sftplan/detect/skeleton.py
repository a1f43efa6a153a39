"""A hardware file for a GPU that no profile knows: what NVML tells, and gaps for the rest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sftplan.detect.nvml import pcie_bytes_per_s
from sftplan.units import format_gib

if TYPE_CHECKING:
    from sftplan.detect.gpus import Machine

_GAPS = """\
# NVML does not tell these. Fill them in from the data sheet: per second, in base units, without
# sparsity (data sheets like to double it), with fp32 accumulation (GeForce: half of the headline).
# hbm_bytes_per_s = 9.36e11    # required; 936 GB/s
# bf16_flops_per_s = 7.1e13    # required, or fp16_flops_per_s where bf16 is emulated
# fp16_flops_per_s = 7.1e13
# tf32_flops_per_s = 3.56e13
# fp32_flops_per_s = 3.56e13   # required; without tensor cores
# nvlink_bytes_per_s = 4.5e11  # all links, one direction; leave it out without NVLink
# tdp_w = 350
# power_flops_per_s = 3.35e14  # on tensor cores, within that power at the highest clock, if known
"""


def skeleton(machine: Machine, name: str) -> str:
    """The text of a file that only lacks the rates; it loads when they are filled in."""
    device = min(machine.devices, key=lambda each: each.memory_bytes)
    lines = [
        f"name = {json.dumps(name)}",
        f"gpus_per_node = {len(machine.devices)}",
        "",
        "[gpu]",
        f"nvml_name = {json.dumps(device.name, ensure_ascii=False)}",
        'vendor = "nvidia"',
        f"memory_bytes = {device.memory_bytes:_}  # {format_gib(device.memory_bytes)} GiB, NVML",
    ]
    if device.reserved_bytes is not None:
        lines.append(f"unusable_bytes = {device.reserved_bytes:_}  # held by the driver, NVML")
    if device.compute_capability is not None:
        lines.append(f"compute_capability = {device.compute_capability}")
    link = pcie_bytes_per_s(device)
    lanes = f"PCIe {device.pcie_generation} x{device.pcie_lanes}, one direction"
    lines.append(
        "# pcie_bytes_per_s = 3.15e10    # required; PCIe 4 x16, one direction"
        if link is None
        else f"pcie_bytes_per_s = {link!r}  # {lanes}"
    )
    host = ["", "[host]", f"num_cpus = {machine.host.num_cpus or 1}"]
    if machine.host.memory_bytes is not None:
        host.append(f"memory_bytes = {machine.host.memory_bytes:_}")
    return "\n".join(lines) + "\n" + _GAPS + "\n".join(host) + "\n"
