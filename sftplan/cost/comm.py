"""Seconds of collectives, copies to the host, and the optimizer on the host; bytes in, seconds out.

A ring of n ranks moves (n-1)/n of the payload over each link for a gather or a reduce-scatter, twice that
for an all-reduce (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware

# A collective of 64 KiB between 2 H200, from the host's call on: 65 us gather, 70 all-reduce, 80
# reduce-scatter (2026-11-24, torch 2.11; tests/published/h200_collectives.csv).
CALL_S = 70e-6
HOP_S = 3.4e-6  # each step of a ring more, over NVLink: nccl, src/graph/tuning.cc, hwLat
NODE_LINK_BYTES_PER_S = 12.5e9  # 100 Gb/s Ethernet per GPU, where a profile does not say; assumed
CPU_ADAM_BYTES_PER_PARAMETER = (
    30  # fp32 p, m, v read and written, gradient read, 2-byte weight written
)
# DeepSpeed's CPU Adam on 16 cores beside an H200, less the copy back: 0.272 s of gpt2-large, 0.667 s of
# gpt2-xl and 1.313 s of Llama 3.2 3B, hence 95, 76 and 80 GB/s (2026-11).
CPU_ADAM_BYTES_PER_S_PER_CORE = 5.2e9
FP32_BYTES = 4


def all_gather_s(nbytes: float, ranks: int, bytes_per_s: float, pieces: int = 1) -> float:
    """Every rank gets the whole payload of `nbytes`, of which it has 1/n; a reduce-scatter takes as long.

    (n-1)/n · S/B + k·(c + (n-2)·α)   in k pieces

    >>> round(all_gather_s(8e9, 8, 350e9), 4)
    0.0201
    """
    if ranks < 2:
        return 0.0
    return (ranks - 1) / ranks * nbytes / bytes_per_s + pieces * _latency_s(ranks - 1)


reduce_scatter_s = all_gather_s


def all_reduce_s(nbytes: float, ranks: int, bytes_per_s: float, pieces: int = 1) -> float:
    """A reduce-scatter, then an all-gather.

    2·(n-1)/n · S/B + k·(c + (2n-3)·α)   in k pieces

    >>> round(all_reduce_s(8e9, 8, 350e9), 4)
    0.0401
    """
    if ranks < 2:
        return 0.0
    return 2 * (ranks - 1) / ranks * nbytes / bytes_per_s + pieces * _latency_s(2 * (ranks - 1))


def _latency_s(steps: int) -> float:
    """Seconds before anything has gone around a ring in so many steps."""
    return CALL_S + (steps - 1) * HOP_S


def copy_s(nbytes: float, bytes_per_s: float) -> float:
    """A pinned copy over the host link.

    >>> round(copy_s(1.1e9, 55.4e9), 3)
    0.02
    """
    return nbytes / bytes_per_s


def cpu_adam_s(parameters: float, bytes_per_s: float) -> float:
    """AdamW on the host, bound by its memory: 30·P / B.

    >>> round(cpu_adam_s(774_030_080, 64e9), 3)
    0.363
    """
    return CPU_ADAM_BYTES_PER_PARAMETER * parameters / bytes_per_s


def exposed_s(seconds: float, hidden_behind: float, last_s: float) -> float:
    """What of a transfer in pieces cannot hide: the last piece never can.

    max(t - T, t_last)

    >>> exposed_s(4.0, 10.0, last_s=0.5), exposed_s(4.0, 1.0, last_s=0.5)
    (0.5, 3.0)
    """
    return max(seconds - hidden_behind, last_s)


def link_bytes_per_s(hardware: Hardware, fraction: float | None = None) -> float:
    """What rings over all GPUs reach together in one direction: the slowest of their links.

    `fraction` is what the collective in hand reaches of it, if not as much as an all-reduce.

    Between nodes there are as many rings as a node has GPUs, each over a network card of its own
    (nccl, src/graph/search.cc).

    >>> from dataclasses import replace
    >>> from sftplan.facts.profiles import load_hardware
    >>> one = replace(load_hardware("h100-sxm"), gpus_per_node=8, internode_bytes_per_s=12.5e9)
    >>> link_bytes_per_s(replace(one, num_nodes=2)) / one.rates.allreduce_fraction  # 8 · 100 Gb/s
    100000000000.0
    """
    gpu, rates = hardware.gpu, hardware.rates
    inside = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
    if hardware.num_nodes > 1:
        each = hardware.internode_bytes_per_s or NODE_LINK_BYTES_PER_S
        inside = min(inside, each * hardware.gpus_per_node)
    return inside * (fraction or rates.allreduce_fraction)


def host_link_bytes_per_s(hardware: Hardware) -> float:
    """Pinned copies between one GPU and its host, in one direction."""
    return hardware.gpu.pcie_bytes_per_s * hardware.rates.pcie_fraction


def cpu_adam_bytes_per_s(hardware: Hardware) -> float:
    """Host memory as CPU Adam reaches it, all ranks of a node together: measured, or its bandwidth or cores."""
    if hardware.rates.cpu_adam_bytes_per_s is not None:
        return hardware.rates.cpu_adam_bytes_per_s
    bandwidth = hardware.rates.host_bytes_per_s
    cores = hardware.host.num_cpus
    return bandwidth if cores is None else min(bandwidth, cores * CPU_ADAM_BYTES_PER_S_PER_CORE)
