"""Host memory of one machine: the processes, what is offloaded, and the saving of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.cost.estimate import HostMemory
from sftplan.facts.buckets import SUB_GROUP_ELEMENTS
from sftplan.facts.params import num_parameters, parameters
from sftplan.facts.strategy import Offload, Precision

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy

# What a host holds beyond before for one rank with torch, transformers, DeepSpeed and CUDA loaded:
# 1.93 to 1.97 GB beside an H200 (2026-11).
PROCESS_BYTES = 1_950_000_000
# The same while stage 3 cuts the model up, before kernels are loaded: 2.59 GB of gpt2-large alone, less its
# weights; among several ranks NCCL is there by then: 4.88 GB of two, less theirs (2026-11).
STARTING_BYTES = 1_040_000_000
STARTING_RANK_BYTES = 1_670_000_000
FP32_BYTES = 4
MOMENTS = 2


def host_memory(
    model: ModelShape, strategy: Strategy, num_gpus: int, gpus_per_node: int
) -> HostMemory:
    """Peak bytes of one host over all its ranks: while the model is built, or saved after a step.

    Under stage 3 the first rank alone has the whole model before it is cut up (and each rank its share
    once more, to lay it out anew: defragment, DeepSpeed 0.19's zero/utils.py). The first two categories
    and what is offloaded are held while training; the model being built and the checkpoint being saved
    are what each takes beyond. inductor's workers come on top while a first step compiles.
    """
    low = strategy.precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    size = 2 if low else FP32_BYTES
    whole = size * num_parameters(model)
    by_category = {"processes": PROCESS_BYTES * gpus_per_node}
    if strategy.offload is not Offload.NONE:
        of_rank = _offloaded(model, strategy, size, num_gpus)
        by_category |= {name: held * gpus_per_node for name, held in of_rank.items()}
    training = held = sum(by_category.values())
    if strategy.zero == 3:
        starting = STARTING_BYTES if num_gpus == 1 else STARTING_RANK_BYTES * gpus_per_node
        held = max(training, starting + whole)
        by_category["model being built"] = held - training
    by_category["checkpoint being saved"] = max(0, training + whole - held)
    return HostMemory(peak_bytes=sum(by_category.values()), by_category=by_category)


def pinned_bytes(nbytes: int) -> int:
    """What a pinned block takes: the next power of two, of any size, and it is never given back.

    PyTorch 2.11 and 2.13, aten/src/ATen/core/CachingHostAllocator.h, allocate.

    >>> pinned_bytes(3_096_120_320), pinned_bytes(4096)
    (4294967296, 4096)
    """
    return 1 << max(0, nbytes - 1).bit_length()


def _offloaded(model: ModelShape, strategy: Strategy, size: int, num_gpus: int) -> dict[str, int]:
    """Bytes of one rank, weights in `size` bytes each. DeepSpeed pins what travels, not the moments."""
    listed = parameters(model)
    groups = [[p.num_elements for p in listed if p.decayed is decayed] for decayed in (True, False)]
    groups = [group for group in groups if group]
    if strategy.zero == 3:
        shares = [[-(-elements // num_gpus) for elements in group] for group in groups]
        found = _stage_3(shares, size)
        if strategy.offload is Offload.OPTIMIZER:
            found["copies"] += size * max(n for group in shares for n in sub_groups(group))
        else:  # each weight as it is cut up, then all of a group in one block
            each = sum(pinned_bytes(size * share) for group in shares for share in group)
            found["weights"] = each + sum(pinned_bytes(size * sum(group)) for group in shares)
    else:
        found = _stage_2(groups, size, num_gpus, accumulates=strategy.accumulation > 1)
    if strategy.offload is Offload.NVME:
        del found["optimizer"]
    return found


def _stage_2(
    groups: list[list[int]], size: int, num_gpus: int, *, accumulates: bool
) -> dict[str, int]:
    """Of each group of weights: fp32 ones and their gradients pinned, moments, pinned weights to send.

    And a pinned gradient as large as the largest; with several passes, each one's sum so far
    (stage_1_and_2.py: __init__, initialize_optimizer_states, async_accumulate_grad_in_cpu_via_gpu).
    """
    shares = [-(-sum(group) // num_gpus) for group in groups]
    fp32 = sum(pinned_bytes(FP32_BYTES * share) for share in shares)
    sums = [pinned_bytes(size * elements) for group in groups for elements in group]
    copies = sum(pinned_bytes(size * share) for share in shares) + max(sums)
    return {
        "optimizer": fp32 + MOMENTS * FP32_BYTES * sum(shares),
        "gradients": fp32 + accumulates * sum(sums) // num_gpus,
        "copies": copies,
    }


def _stage_3(shares: list[list[int]], size: int) -> dict[str, int]:
    """fp32 weights and moments of each sub-group, its pinned gradient, and one of all in `size` bytes.

    stage3.py: _create_fp32_partitions, initialize_optimizer_states, _setup_for_real_optimizer.
    """
    elements = sum(map(sum, shares))
    pinned = (pinned_bytes(FP32_BYTES * n) for group in shares for n in sub_groups(group))
    return {
        "optimizer": (1 + MOMENTS) * FP32_BYTES * elements,
        "gradients": sum(pinned),
        "copies": pinned_bytes(size * elements),
    }


def sub_groups(shares: Iterable[int]) -> list[int]:
    """Elements of the sub-groups in which stage 3 moves a group's weights (_create_fp16_sub_groups).

    >>> sub_groups([64_000_000, 50_000_000, 20_000_000])
    [114000000, 20000000]
    """
    found = [0]
    for share in shares:
        if found[-1] >= SUB_GROUP_ELEMENTS:
            found.append(0)
        found[-1] += share
    return found
