"""ZeRO and offload: how DeepSpeed lays weights, gradients and optimizer states over ranks and host.

Sizes follow DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py): stages 1 and 2 keep the weights flat
and whole and reduce gradients through a bucket; stage 3 keeps a share of each layer and gathers it to use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.facts.buckets import (
    PREFETCH_BUCKET_ELEMENTS,
    REDUCE_BUCKET_ELEMENTS,
    SUB_GROUP_ELEMENTS,
    live_elements,
    overlaps,
)
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Offload, Precision
from sftplan.step.tape import ASIDE
from sftplan.step.tensor import DType, Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.forward import Weights
    from sftplan.step.tape import Tape

REDUCING = f"{ASIDE}reduce"  # reduction_stream; stage3.py, reduce_and_partition_stream
GATHERING = f"{ASIDE}gather"  # parameter_offload.py, __allgather_stream
NORM_BYTES = 8  # DeepSpeed squares and sums gradients in fp64 (runtime/utils.py, get_norm_dtype)


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

    Gradients are left out: at the peak they may not be there. 12·P·(1 − 1/N) under bf16-master.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Precision, Strategy
    >>> two = Strategy(precision=Precision.BF16_MASTER, zero=2)
    >>> sharding_saves_bytes(builtin("gpt2-large"), two, 8)  # 12 · 774030080 · 7/8 - two buckets
    7927315840
    """
    count = num_parameters(model)
    low = strategy.precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    size = DType.BF16.size if low else DType.FP32.size
    states = 3 if strategy.precision is Precision.BF16_MASTER else 2
    own = size if strategy.precision is Precision.BF16_TRUE else DType.FP32.size
    saved = states * own * count - 3 * DType.FP32.size * share(count, ranks)
    if strategy.zero == 3:
        saved += size * (count - share(count, ranks))
    return saved - sharding_of(strategy, ranks).num_buckets * REDUCE_BUCKET_ELEMENTS * size


def largest_sub_group(numels: Sequence[int], limit: int) -> int:
    """Elements of the largest group that stage 3 updates at once: weights until `limit` is reached.

    stage3.py, _create_fp16_sub_groups.

    >>> largest_sub_group([60, 30, 20, 50, 40], 100)
    110
    """
    largest = room = 0
    for numel in numels:
        room += numel
        largest = max(largest, room)
        if room >= limit:
            room = 0
    return largest


class Shards:
    """The flat buffers of one rank, and what happens to gradients as they come.

    `numels` are the elements of all weights of the whole model, of which the tape may have a few layers.
    """

    def __init__(
        self, tape: Tape, weights: Weights, sharding: Sharding, numels: Sequence[int]
    ) -> None:
        self.tape = tape
        self.numels = numels
        self.elements = sum(numels)
        self.weights = weights
        self.sharding = sharding
        self.size = weights.ordered[0][1].dtype.size
        self._held: list[Storage] = []
        self._bucket: list[Storage] = []
        self._partition: list[Storage] = []
        self._gathered: list[Storage] = []
        self._last = True

    def layer_elements(self) -> dict[int | None, int]:
        """Parameters of each layer, and (None) of all that is in no layer."""
        counts: dict[int | None, int] = {}
        for layer, weight in self.weights.ordered:
            counts[layer] = counts.get(layer, 0) + weight.numel
        return counts

    def prepare(self) -> None:
        """Flatten the weights, or cut them up; set up master weights and persistent buffers.

        Stage 3 cuts them one by one: each is here whole for that long (partition_parameters.py,
        _convert_to_zero_parameters).
        """
        stage, ranks = self.sharding.stage, self.sharding.ranks
        if stage == 3:
            for layer, weight in self.weights.ordered:
                self.tape.enter(layer)
                self.tape.scratch(weight.numel * self.size)
        for layer, elements in self.layer_elements().items():
            self.tape.enter(layer)
            held = share(elements, ranks) if stage == 3 else elements
            on_gpu = not (stage == 3 and self.sharding.offloads_weights)
            flat = self.tape.storage(held * self.size if on_gpu else 0, "weights")
            for owner, weight in self.weights.ordered:
                if owner == layer:
                    weight.storage = flat
            if not self.sharding.offloads_optimizer:
                self._hold(share(elements, ranks) * DType.FP32.size, "optimizer")
                if stage == 3:
                    self._hold(share(elements, ranks) * self.size, "gradients")
        self.tape.enter(None)
        if stage == 3:
            self._hold(REDUCE_BUCKET_ELEMENTS * self.size, "communication")
        elif self.sharding.offloads_optimizer:  # temp_grad_buffer_for_gpu_offload
            self._hold(max(self.numels) * self.size, "communication")

    def _hold(self, num_bytes: int, kind: str) -> None:
        self._held.append(self.tape.storage(num_bytes, kind))

    def begin_pass(self, *, last: bool) -> None:
        """Stage 3: the whole weights that are there at once while a pass runs.

        A single rank uses its share as it is, unless that is on the host. Between ranks what is on
        its way is there twice: as it arrives, and cut to the weights.
        """
        sharding, self._last = self.sharding, last
        if sharding.stage < 3 or (sharding.ranks == 1 and not sharding.offloads_weights):
            return
        layers = self.layer_elements()
        block = max((count for layer, count in layers.items() if layer is not None), default=0)
        outside = max(weight.numel for layer, weight in self.weights.ordered if layer is None)
        whole = min(self.elements, live_elements(block) + outside)
        self._gathered.append(self.tape.storage(whole * self.size, f"weights{GATHERING}"))
        if sharding.ranks > 1:
            coming = min(whole, PREFETCH_BUCKET_ELEMENTS) * self.size
            self._gathered.append(self.tape.storage(coming, f"communication{GATHERING}"))

    def take(self, gradient: Tensor) -> bool:
        """Whether a gradient that has come is copied into the bucket and let go.

        From stage 2 on in every pass; in stage 1 in the last one, while the pass goes on only where
        reducing overlaps with it (stage_1_and_2.py, process_gradients). The first one of a pass brings
        the bucket into being (setup_buckets), and the room for the rank's share of all. What goes to
        the host is measured in fp64 and brought to fp32 first.
        """
        sharding, owner = self.sharding, self.tape.owner
        taken = sharding.stage >= 2 or (sharding.overlaps and self._last)
        if sharding.stage < 3 and not self._bucket:
            self.tape.enter(None)
            size = REDUCE_BUCKET_ELEMENTS * self.size
            count = sharding.num_buckets
            self._bucket = [self.tape.storage(size, "communication") for _ in range(count)]
            if taken:
                self.hold_gradients()
            self.tape.enter(owner)
        if taken and sharding.offloads_optimizer:
            mine = share(gradient.numel, sharding.ranks)
            self.tape.scratch(mine * NORM_BYTES, stream=REDUCING)
            self.tape.scratch(mine * DType.FP32.size, stream=REDUCING)
        return taken

    def hold_gradients(self) -> None:
        """The rank's share of the gradients, which stays until the step, unless the host has it.

        It is taken on the stream that reduces (stage_1_and_2.py, copy_grads_in_partition).
        """
        if self.sharding.stage == 3 or self._partition or self.sharding.offloads_optimizer:
            return
        kind = f"gradients{REDUCING}" if self.sharding.overlaps else "gradients"
        for layer, elements in self.layer_elements().items():
            self.tape.enter(layer)
            held = share(elements, self.sharding.ranks) * self.size
            self._partition.append(self.tape.storage(held, kind))
        self.tape.enter(None)

    def end_pass(self, *, last: bool) -> None:
        """The bucket goes when the backward pass ends; stage 1 shares gradients out after the last.

        A bucket is copied to be sent where it holds more than one tensor of one rank: in stage 3
        always (coalesced_collectives.py, reduce_scatter_coalesced), before it where a share ends
        in it (stage_1_and_2.py, allreduce_bucket).
        """
        self._gathered.clear()
        if self.sharding.stage == 3 or (
            self.sharding.ranks > 1 and (last or self.sharding.stage == 2)
        ):
            sent = min(REDUCE_BUCKET_ELEMENTS, self.elements) * self.size
            self.tape.scratch(sent, stream=REDUCING)
        if self.sharding.stage == 1 and last:
            self.hold_gradients()
            for _, weight in self.weights.ordered:
                assert weight.node is not None
                weight.node.extra = None
        self._bucket.clear()

    def create_moments(self) -> None:
        """The two moments of the rank's share, in fp32, unless the host holds them."""
        for layer, elements in self.layer_elements().items():
            self.tape.enter(layer)
            for _ in ("exp_avg", "exp_avg_sq") if not self.sharding.offloads_optimizer else ():
                self._hold(share(elements, self.sharding.ranks) * DType.FP32.size, "optimizer")
        self.tape.enter(None)

    def update(self, *, first: bool) -> None:
        """The optimizer's step on the rank's share: gradients in fp64 for the norm, then in fp32."""
        if self.sharding.offloads_optimizer:
            return
        ranks = self.sharding.ranks
        self.tape.scratch(share(max(self.numels), ranks) * NORM_BYTES)
        if first:
            self.create_moments()
        mine = share(self.elements, ranks)
        together = mine
        if self.sharding.stage == 3:
            shares = [share(numel, ranks) for numel in self.numels]
            together = largest_sub_group(shares, SUB_GROUP_ELEMENTS)
        self.tape.scratch(together * self.size, together * DType.FP32.size)
        held = Tensor((mine,), DType.FP32, self.tape.storage(0))
        self.tape.pointwise("adamw", [held] * 7)
        self._partition.clear()
