"""ZeRO and offload: how DeepSpeed lays weights, gradients and optimizer states over ranks and host.

Sizes follow DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py): stages 1 and 2 keep the weights flat
and whole and reduce gradients through a bucket; stage 3 keeps a share of each layer and gathers it to use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.facts.buckets import PREFETCH_BUCKET_ELEMENTS, REDUCE_BUCKET_ELEMENTS, overlaps
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Offload, Precision
from sftplan.step.tensor import DType, Storage, Tensor

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.forward import Weights
    from sftplan.step.tape import Tape


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Over how many ranks what is shared, and what is kept on the host."""

    stage: int
    ranks: int
    offloads_optimizer: bool
    offloads_weights: bool

    @property
    def num_buckets(self) -> int:
        """Gradients go through one bucket, or two in turn where reducing overlaps with the backward pass.

        stage_1_and_2.py, setup_buckets; stage 3 has one however it reduces.
        """
        twice = overlaps(self.stage, self.ranks, offloads=self.offloads_optimizer)
        return 2 if self.stage < 3 and twice else 1

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


class Shards:
    """The flat buffers of one rank, and what happens to gradients as they come."""

    def __init__(self, tape: Tape, weights: Weights, sharding: Sharding, elements: int) -> None:
        self.tape = tape
        self.elements = elements  # of the whole model, of which the tape may have a few layers
        self.weights = weights
        self.sharding = sharding
        self.buffers: list[Storage] = []
        self.bucket: list[Storage] = []
        self.partition: list[Storage] = []
        self._whole: dict[int | None, Storage] = {}
        self.size = weights.ordered[0][1].dtype.size

    def layer_elements(self) -> dict[int | None, int]:
        """Parameters of each layer, and (None) of all that is in no layer."""
        counts: dict[int | None, int] = {}
        for layer, weight in self.weights.ordered:
            counts[layer] = counts.get(layer, 0) + weight.numel
        return counts

    def prepare(self) -> None:
        """Flatten the weights, or cut them up; set up master weights and persistent buffers."""
        stage, ranks = self.sharding.stage, self.sharding.ranks
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
        largest = max(weight.numel for _, weight in self.weights.ordered)
        if stage == 3:
            self._hold(REDUCE_BUCKET_ELEMENTS * self.size, "communication")
        if self.sharding.offloads_optimizer:
            self._hold(largest * self.size, "communication")

    def _hold(self, num_bytes: int, kind: str) -> None:
        self.buffers.append(self.tape.storage(num_bytes, kind))

    def begin_backward(self) -> None:
        """Stages 1 and 2 allocate the bucket for each backward pass, stage 2 holds its gradients."""
        if self.sharding.stage == 3:
            return
        size = REDUCE_BUCKET_ELEMENTS * self.size
        count = self.sharding.num_buckets
        self.bucket = [self.tape.storage(size, "communication") for _ in range(count)]
        self.hold_gradients()

    def hold_gradients(self) -> None:
        """Stage 2: the rank's share of the gradients, which stays until the step."""
        if self.sharding.stage == 2 and not (self.partition or self.sharding.offloads_optimizer):
            for layer, elements in self.layer_elements().items():
                self.tape.enter(layer)
                held = share(elements, self.sharding.ranks) * self.size
                self.partition.append(self.tape.storage(held, "gradients"))
            self.tape.enter(None)

    def end_backward(self) -> None:
        """The bucket goes when the backward pass ends."""
        self.bucket.clear()

    def takes_gradients(self) -> bool:
        """From stage 2 on a gradient is copied into the bucket as it comes, and let go."""
        return self.sharding.stage >= 2

    def gather(self, layer: int | None) -> None:
        """Stage 3: the whole weights of a layer, and room for what is fetched ahead."""
        if self.sharding.stage < 3 or layer in self._whole:
            return
        elements = self.layer_elements()[layer]
        ahead = min(PREFETCH_BUCKET_ELEMENTS, elements) if layer is not None else 0
        whole = self.tape.storage((elements + ahead) * self.size, "weights")
        self._whole[layer] = whole
        for owner, weight in self.weights.ordered:
            if owner == layer:
                weight.storage = whole

    def release(self, layer: int | None) -> None:
        """Stage 3: back to the rank's own share."""
        if self._whole.pop(layer, None) is None:
            return
        empty = self.tape.storage(0, "weights")
        for owner, weight in self.weights.ordered:
            if owner == layer:
                weight.storage = empty

    def create_moments(self) -> None:
        """The two moments of the rank's share, in fp32, unless the host holds them."""
        for layer, elements in self.layer_elements().items():
            self.tape.enter(layer)
            for _ in ("exp_avg", "exp_avg_sq") if not self.sharding.offloads_optimizer else ():
                self._hold(share(elements, self.sharding.ranks) * DType.FP32.size, "optimizer")
        self.tape.enter(None)

    def update(self, *, first: bool) -> None:
        """The optimizer's step on the rank's share: moments once, gradients in fp32 while it runs."""
        if self.sharding.offloads_optimizer:
            self.partition.clear()
            return
        if first:
            self.create_moments()
        mine = share(self.elements, self.sharding.ranks)
        flat = mine * self.size if self.sharding.stage < 3 else 0
        self.tape.scratch(flat, mine * DType.FP32.size)
        held = Tensor((mine,), DType.FP32, self.tape.storage(0))
        self.tape.pointwise("adamw", [held] * 7)
        self.partition.clear()
