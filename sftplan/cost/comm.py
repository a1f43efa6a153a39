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
CPU_ADAM_BYTES_PER_PARAMETER = 28  # fp32 p, m and v read and written, gradient read
CLIP_BYTES_PER_PARAMETER = 8  # the fp32 gradient scaled where it lies (unscale_and_clip_grads)
# What DeepSpeed's CPU Adam, clipping and the cast to 16 bits reach on 16 cores beside an H200: 42 bytes a
# parameter of gpt2-large in 0.345 s under ZeRO-2 and 0.299 s under ZeRO-3 with all offloaded, what else is
# in those phases taken off: 94 and 109 GB/s (2026-11-26).
HOST_BYTES_PER_S_PER_CORE = 6.3e9
# To the GPU from fresh memory that is not pinned, its page faults included: 1.55 GB of gpt2-large in 0.35 s,
# what ZeRO-3 takes longer to move weights with its optimizer offloaded alone (2026-11-26).
PAGEABLE_BYTES_PER_S = 4.4e9
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
    """A copy over the host link.

    >>> round(copy_s(1.1e9, 55.4e9), 3)
    0.02
    """
    return nbytes / bytes_per_s


def cpu_update_s(parameters: float, weight_bytes: int, bytes_per_s: float, *, clips: bool) -> float:
    """Clipping, AdamW and the cast to the weights' type on the host, bound by its memory.

    (8 + 28 + 4 + w)·P / B   with weights of w bytes

    >>> round(cpu_update_s(774_030_080, 2, 100.8e9, clips=True), 3)
    0.323
    """
    each = CPU_ADAM_BYTES_PER_PARAMETER + FP32_BYTES + weight_bytes
    return (each + CLIP_BYTES_PER_PARAMETER * clips) * parameters / bytes_per_s


def leaving_bytes(weight_bytes: int, passes: int, *, stage: int) -> int:
    """Bytes of each gradient over the host link in a step, both directions, one after the other.

    Stages 1 and 2 send it in fp32; of several passes the sum so far comes and goes in w bytes, but for
    the first and the last. Stage 3 has every pass's go and come in w bytes, and sends the last in fp32.

        4, or (2k-1)·w + 4 of k passes;   2·k·w + 4 under stage 3

    >>> leaving_bytes(2, 1, stage=2), leaving_bytes(2, 2, stage=2), leaving_bytes(2, 1, stage=3)
    (4, 10, 8)
    """
    if stage == 3:
        return 2 * passes * weight_bytes + FP32_BYTES
    return FP32_BYTES + (2 * passes - 1) * weight_bytes * (passes > 1)


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
    return bandwidth if cores is None else min(bandwidth, cores * HOST_BYTES_PER_S_PER_CORE)
