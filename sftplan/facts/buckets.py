"""Buffers between ranks: the sizes that `launch` sets and that the tape of a step assumes.

Counted in elements, as DeepSpeed does. Its own defaults are made for clusters (0.19.8,
runtime/zero/config.py): a reduce bucket of 5e8 elements is 1 GB in 16 bits and two of them, as
overlapping needs, more than the weights of gpt2-large.
"""

from __future__ import annotations

# 100 MB in 16 bits: collectives reach their bandwidth from some 10 MB on (nccl-tests, PERFORMANCE.md),
# and DeepSpeed reduces what is larger, an embedding say, by itself.
REDUCE_BUCKET_ELEMENTS = 50_000_000
# What plain data parallelism sums at once, while the backward pass goes on: 32 MB in 16 bits, as
# DistributedDataParallel's 25 MiB; what is left after the pass is no more than the last one.
SUM_BUCKET_ELEMENTS = 2**24
ALLGATHER_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default; not read where NCCL gathers in place
PREFETCH_BUCKET_ELEMENTS = 50_000_000  # DeepSpeed's default
PERSISTENCE_ELEMENTS = 100_000  # DeepSpeed's default: smaller parameters stay gathered
# Weights that one step of the stage-3 optimizer brings to fp32 at once: 6 bytes each. The default of
# 1e9 is 6 GB beside a model that was sharded to save less.
SUB_GROUP_ELEMENTS = 100_000_000

# Blocks that the host may be ahead of the GPU under stage 3, so that gathered weights are soon free again:
# one that runs, one that waits (train/ahead.py).
AHEAD_BLOCKS = 2


def reuse_elements(block_elements: int) -> int:
    """How far ahead stage 3 looks before it lets a gathered parameter go.

    A checkpointed block runs forward and then backward again: its weights are needed twice within
    two blocks, and gathered once if it looks that far. The default of 1e9 keeps the second half of a
    smaller model gathered from the forward to the backward pass.

    >>> reuse_elements(19_677_440)  # a block of gpt2-large
    39354880
    """
    return 2 * block_elements


def live_elements(block_elements: int) -> int:
    """How many gathered elements stop stage 3 from fetching ahead.

    Each module that runs, a dropout too, asks for another prefetch bucket until so many are there
    (partitioned_param_coordinator.py, _fetch_sub_module_impl): the default of 1e9 holds all of a smaller
    model, 1.55 GB of gpt2-large in 16 bits. Enough are the blocks in use and one bucket on its way.

    >>> live_elements(19_677_440)  # gpt2-large
    89354880
    """
    return reuse_elements(block_elements) + PREFETCH_BUCKET_ELEMENTS


def overlaps(stage: int, num_gpus: int, *, offloads: bool) -> bool:
    """Whether gradients leave on a stream of their own, which takes a second bucket.

    There has to be somewhere to go: another GPU, or the host.
    """
    return stage == 3 or num_gpus > 1 or offloads
