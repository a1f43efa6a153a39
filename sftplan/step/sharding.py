"""ZeRO and offload: over how many ranks what is shared, and how much that saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.facts.buckets import REDUCE_BUCKET_ELEMENTS, overlaps
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Offload, Precision
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Over how many ranks what is shared, and what is kept on the host."""

    stage: int
    ranks: int
    offloads_optimizer: bool
    offloads_weights: bool

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced on a stream of their own while the backward pass goes on."""
        return overlaps(self.stage, self.ranks, offloads=self.offloads_optimizer)

    @property
    def num_buckets(self) -> int:
        """Gradients go through one bucket, or two in turn where reducing overlaps with the backward pass.

        stage_1_and_2.py, setup_buckets; stage 3 has one however it reduces.
        """
        return 2 if self.stage < 3 and self.overlaps else 1

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the step runs under DeepSpeed: otherwise plain PyTorch, or its data parallelism."""
        return self.stage > 0 or self.offloads_optimizer


def sharding_of(strategy: Strategy, num_gpus: int) -> Sharding:
    """The sharding that a strategy asks for."""
    everything = strategy.offload in (Offload.ALL, Offload.NVME)
    return Sharding(
        stage=strategy.zero,
        ranks=num_gpus,
        offloads_optimizer=strategy.offload is not Offload.NONE,
        offloads_weights=everything,
    )


def share(elements: int, ranks: int) -> int:
    """One rank's part, rounded up.

    >>> share(774_030_080, 8)
    96753760
    """
    return -(-elements // ranks)


def sharding_saves_bytes(model: ModelShape, strategy: Strategy, ranks: int) -> int:
    """What sharding surely takes off a rank: optimizer states, and from stage 3 on weights.

    Gradients are left out: at the peak they may not be there. P·(10 − 12/N) under bf16-master, whose
    weights are the upper halves of their masters where nothing is sharded.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Precision, Strategy
    >>> two = Strategy(precision=Precision.BF16_MASTER, zero=2)
    >>> sharding_saves_bytes(builtin("gpt2-large"), two, 8)  # 774030080 · (10 - 12/8) - two buckets
    6379255680
    """
    count = num_parameters(model)
    low = strategy.precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    size = DType.BF16.size if low else DType.FP32.size
    own = size if strategy.precision is Precision.BF16_TRUE else DType.FP32.size
    rest = DType.INT16.size if strategy.precision is Precision.BF16_MASTER else 0
    saved = (2 * own + rest) * count - 3 * DType.FP32.size * share(count, ranks)
    if strategy.zero == 3:
        saved += size * (count - share(count, ranks))
    return saved - sharding_of(strategy, ranks).num_buckets * REDUCE_BUCKET_ELEMENTS * size


def sub_groups(numels: Sequence[int], limit: int) -> list[int]:
    """Elements of the groups that stage 3 updates at once: weights until `limit` is reached.

    stage3.py, _create_fp16_sub_groups.

    >>> sub_groups([60, 30, 20, 50, 40], 100)
    [110, 90]
    """
    groups, room = [], 0
    for numel in numels:
        room += numel
        if room >= limit:
            groups.append(room)
            room = 0
    return [*groups, room] if room else groups
