"""GPU memory that the driver shows beyond the context and the allocator's reserve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.sharding import sharding_of

if TYPE_CHECKING:
    from sftplan.facts.strategy import Strategy

# Driver memory of NCCL on 2 x H200 (2026-11-24, torch 2.11 and its NCCL, NVLink multicast off): the first
# communicator with its collectives, and what each further one takes.
NCCL_BYTES = 884_998_144
SECOND_NCCL_BYTES = 509_607_936
# The same of one rank, beside which there is nobody: 585 to 608 MB more than without, in eight of nine dry
# runs of gpt2-large, gpt2-xl and Llama 3.2 3B on an H200 (2026-11, NCCL of torch 2.11).
SINGLE_NCCL_BYTES = 595_000_000
# What the context grows by with the first CUDA graph that a process captures: 70 MiB on an H200 (2026-11-27,
# driver 580, torch 2.11; three jobs, and a graph of one kernel); 2.3 KiB with each kernel are not counted.
# Beside NCCL on 2 x H100 captured steps took no more than others.
GRAPHS_BYTES = 73_400_320


def nccl_bytes(strategy: Strategy, num_gpus: int) -> int:
    """Driver memory of the communicators of one rank.

    We sum targets in the world's; stages 1 and 2 use DeepSpeed's clone of it beside (utils/groups.py,
    _clone_world_group), stage 3 shares weights out in the world's (partition_parameters.py, Init).

    >>> from sftplan.facts.strategy import Strategy
    >>> [nccl_bytes(Strategy(zero=stage), 2) // 10**6 for stage in range(4)]
    [884, 1394, 1394, 884]
    """
    sharding = sharding_of(strategy, num_gpus)
    if num_gpus == 1:
        return SINGLE_NCCL_BYTES if sharding.uses_deepspeed else 0
    clones = sharding.uses_deepspeed and sharding.stage < 3
    return NCCL_BYTES + clones * SECOND_NCCL_BYTES


def graphs_bytes(strategy: Strategy, num_gpus: int, *, captured: bool) -> int:
    """Driver memory of CUDA graphs, where `captured` passes are replayed as such.

    >>> from sftplan.facts.strategy import Strategy
    >>> [graphs_bytes(Strategy(), gpus, captured=True) >> 20 for gpus in (1, 2)]
    [70, 0]
    """
    return GRAPHS_BYTES if captured and not nccl_bytes(strategy, num_gpus) else 0
