"""What follows the backward pass: clipping and the optimizer."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from sftplan.facts.strategy import Optimizer, Precision
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.strategy import Strategy
    from sftplan.step.tape import Tape

    Trained = Sequence[tuple[int | None, Tensor]]

FOREACH_CHUNK_ELEMENTS = 65536  # kChunkSize of aten/native/cuda/MultiTensorApply.cuh
MASTER_BUCKET_ELEMENTS = 2**26  # gradients brought to fp32 at once under bf16-master
EIGHT_BIT_BLOCK_ELEMENTS = 256  # bitsandbytes: one fp32 scale for so many 8-bit moments
EIGHT_BIT_MIN_ELEMENTS = 4096  # bitsandbytes: smaller tensors keep fp32 moments


def clip(tape: Tape, weights: Trained, *, scales: bool = True) -> None:
    """torch.nn.utils.clip_grad_norm_ with foreach kernels: a partial sum per chunk, a norm per tensor.

    `scales`: gradients are multiplied in a pass of their own, not where the optimizer reads them.
    """
    chunks = max(-(-w.numel // FOREACH_CHUNK_ELEMENTS) for _, w in weights)
    partial, norms = [], []
    for layer, _ in weights:  # one buffer in truth; here each layer has its part of it
        tape.enter(layer)
        partial.append(tape.empty((chunks,), DType.FP32, "temporary"))
    for layer, weight in weights:
        tape.enter(layer)
        norms.append(tape.empty((), weight.dtype, "temporary"))
    for weight, times in equals(weights):
        tape.pointwise("norm", [weight], times=times)
        if scales:
            tape.pointwise("clip", [weight, weight], times=times)
    tape.enter(None)
    partial.clear()
    norms.clear()


def equals(weights: Trained) -> list[tuple[Tensor, int]]:
    """One weight of each shape and type, and how many are like it: their kernels are."""
    first: dict[tuple[tuple[int, ...], DType], Tensor] = {}
    counts: Counter[tuple[tuple[int, ...], DType]] = Counter()
    for _, weight in weights:
        key = (weight.shape, weight.dtype)
        first.setdefault(key, weight)
        counts[key] += 1
    return [(weight, counts[key]) for key, weight in first.items()]


def buckets(numels: Sequence[int], limit: int) -> list[range]:
    """Weights in their order, in groups of at most `limit` elements; a larger weight stands alone.

    >>> buckets([5, 2, 2, 1], 4)
    [range(0, 1), range(1, 3), range(3, 4)]
    """
    starts: list[int] = []
    room = 0
    for number, numel in enumerate(numels):
        if not starts or numel > room:
            starts.append(number)
            room = limit
        room -= numel
    return [range(start, stop) for start, stop in pairwise([*starts, len(numels)])]


class Update:
    """AdamW over the trained tensors; the first step creates its states.

    torch's fused kernel keeps two moments in the weights' type and a step counter. Under `bf16-master`
    one kernel moves weights and 16 bits more, which together are fp32 (train/master_adamw.py), its states
    there from the beginning; `adamw-8bit` keeps one byte per moment and a scale per block, and where
    weights are bf16 it has fp32 copies of them and brings gradients to fp32 bucket by bucket.
    """

    def __init__(self, strategy: Strategy, order: Sequence[int]) -> None:
        self.order = order  # of the whole model's weights: which one of the tape's stands for each
        self.master = strategy.precision is Precision.BF16_MASTER
        self.eight_bit = strategy.optimizer is Optimizer.ADAMW_8BIT
        self.one_kernel = self.master and not self.eight_bit  # train/master_adamw.py
        self.copies = self.master and self.eight_bit  # of the weights, in fp32
        self.states: list[Tensor] = []

    def prepare(self, tape: Tape, weights: Trained) -> None:
        """fp32 copies exist before the first step, and the states of the one kernel."""
        if self.copies:
            for layer, weight in weights:
                tape.enter(layer)
                self.states.append(tape.empty(weight.shape, DType.FP32, "optimizer"))
            tape.enter(None)
        if self.one_kernel:
            self.create(tape, weights)

    def step(self, tape: Tape, weights: Trained, *, first: bool) -> None:
        """One update of all weights."""
        if self.copies:
            self._bucketed(tape, weights, first=first)
        elif first and not self.one_kernel:
            self.create(tape, weights)
        kind = "master_adamw" if self.one_kernel else "adamw"
        for weight, times in equals(weights):
            tape.pointwise(kind, self._moved(weight), times=times)

    def create(self, tape: Tape, weights: Trained) -> None:
        """The moments of all weights, weight by weight."""
        for layer, weight in weights:
            tape.enter(layer)
            self._create(tape, weight)
        tape.enter(None)

    def _create(self, tape: Tape, weight: Tensor) -> None:
        dtype = DType.FP32 if self.master else weight.dtype
        small = weight.numel < EIGHT_BIT_MIN_ELEMENTS
        if not self.eight_bit:
            self.states.append(tape.empty((), DType.FP32, "optimizer"))
        if self.one_kernel:
            self.states.append(tape.empty(weight.shape, DType.INT16, "optimizer"))
        for _ in ("exp_avg", "exp_avg_sq"):
            if self.eight_bit and not small:
                blocks = -(-weight.numel // EIGHT_BIT_BLOCK_ELEMENTS)
                self.states.append(tape.empty(weight.shape, DType.BYTE, "optimizer"))
                self.states.append(tape.empty((blocks,), DType.FP32, "optimizer"))
            else:
                own = DType.FP32 if self.eight_bit else dtype
                self.states.append(tape.empty(weight.shape, own, "optimizer"))

    def _bucketed(self, tape: Tape, weights: Trained, *, first: bool) -> None:
        """fp32 gradients, bucket by bucket alive while their weights are updated."""
        numels = [weights[place][1].numel for place in self.order]
        created = -1
        for bucket in buckets(numels, MASTER_BUCKET_ELEMENTS):
            held = [
                tape.storage(numels[number] * DType.FP32.size, "temporary") for number in bucket
            ]
            last = max(self.order[number] for number in bucket)
            if first and last > created:
                self.create(tape, weights[created + 1 : last + 1])
                created = last
            while held:
                del held[0]  # in their order, as training lets them go

    def _moved(self, weight: Tensor) -> list[Tensor]:
        """Each read or written once: weight, gradient, two moments in; weight and moments out; rests both ways."""
        if self.eight_bit:
            moment = Tensor(weight.shape, DType.BYTE, weight.storage)
            return [weight, weight, weight, moment, moment, moment, moment]
        if not self.master:
            return [weight] * 7
        moment = Tensor(weight.shape, DType.FP32, weight.storage)
        return [*[weight] * 3, *[moment] * 4, *[weight] * 2]
