"""ZeRO and offload: how DeepSpeed lays weights, gradients and optimizer states over ranks and host.

Sizes follow DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py): stages 1 and 2 keep the weights flat
and whole and reduce gradients through a bucket; stage 3 keeps a share of each layer and gathers it to use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.buckets import (
    AHEAD_BLOCKS,
    PREFETCH_BUCKET_ELEMENTS,
    REDUCE_BUCKET_ELEMENTS,
    SUB_GROUP_ELEMENTS,
    live_elements,
)
from sftplan.step.sharding import Sharding, share, sub_groups
from sftplan.step.tape import ASIDE
from sftplan.step.tensor import DType, Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.step.forward import Weights
    from sftplan.step.tape import Tape

REDUCING = f"{ASIDE}reduce"  # reduction_stream; stage3.py, reduce_and_partition_stream
GATHERING = f"{ASIDE}gather"  # parameter_offload.py, __allgather_stream
NORM_BYTES = 8  # DeepSpeed squares and sums gradients in fp64 (runtime/utils.py, get_norm_dtype)
NORM_PART_ELEMENTS = 250_000_000  # stage3.py, _constant_buffered_norm2


class Shards:
    """The flat buffers of one rank, and what happens to gradients as they come.

    `numels` are the elements of all weights of the whole model, of which the tape may have a few layers.
    """

    def __init__(
        self, tape: Tape, weights: Weights, sharding: Sharding, groups: Sequence[Sequence[int]]
    ) -> None:
        self.tape = tape
        self.groups = groups
        self.numels = numels = [numel for group in groups for numel in group]
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
        """Flatten the weights, or cut them up; set up master weights and persistent buffers."""
        if self.sharding.stage == 3:
            self._cut()
            self._hold(REDUCE_BUCKET_ELEMENTS * self.size, "communication")
            return
        self._flatten()
        if self.sharding.offloads_optimizer:  # temp_grad_buffer_for_gpu_offload
            self._hold(max(self.numels) * self.size, "communication")

    def _flatten(self) -> None:
        """Group by group beside the weights, which then go; masters are of a copy of the rank's share.

        stage_1_and_2.py, flatten_on_accelerator: there is room, as training needs more.
        """
        self.tape.enter(None)
        for vectors, group in enumerate(self.groups):
            flat = self.tape.storage(sum(group) * self.size, "weights")
            for _, weight in self.weights.ordered:
                if (len(weight.shape) <= 1) == bool(vectors):
                    weight.storage = flat
            mine = share(sum(group), self.sharding.ranks)
            copy = self.tape.storage(mine * self.size, "temporary")
            if not self.sharding.offloads_optimizer:
                self._hold(mine * DType.FP32.size, "optimizer")
            del copy

    def _cut(self) -> None:
        """Weight by weight, each here whole for that long; then the shares of all in one place.

        partition_parameters.py, _convert_to_zero_parameters; stage3.py, __init__ and
        _create_fp16_partitions_with_defragmentation.
        """
        ranks, on_gpu = self.sharding.ranks, not self.sharding.offloads_weights
        parts = []
        for layer, weight in self.weights.ordered:
            self.tape.enter(layer)
            whole = self.tape.storage(weight.numel * self.size, "temporary")
            if on_gpu:
                parts.append(self.tape.storage(share(weight.numel, ranks) * self.size, "weights"))
            del whole
        self.tape.enter(None)
        del parts
        mine = sum(share(numel, ranks) for numel in self.numels)
        flat = self.tape.storage(mine * self.size if on_gpu else 0, "weights")
        for _, weight in self.weights.ordered:
            weight.storage = flat
        if not self.sharding.offloads_optimizer:
            self._take_masters()
            self._hold(mine * self.size, "gradients")

    def _take_masters(self) -> None:
        """Group by group from a copy in fp32, which goes once the next one is there.

        stage3.py, _create_fp32_partitions; initialize_optimizer_states then takes a gradient of the largest.
        """
        flats = self.flats()
        copy = None
        for flat in flats:
            copy = self.tape.storage(flat * DType.FP32.size, "temporary")
            self._hold(flat * DType.FP32.size, "optimizer")
        del copy
        self.tape.scratch(max(flats) * DType.FP32.size)

    def _hold(self, num_bytes: int, kind: str) -> None:
        self._held.append(self.tape.storage(num_bytes, kind))

    def begin_pass(self, *, last: bool) -> None:
        """Stage 3: the whole weights that are there at once while a pass runs.

        A single rank uses its share as it is, unless that is on the host. What runs is there however
        large it is, and nothing is fetched ahead beyond the limit (partitioned_param_coordinator.py,
        fetch_sub_module). What the GPU has not used yet stays, as far as the host is ahead. Between
        ranks what is on its way is there twice: as it arrives, and cut to the weights.
        """
        sharding, self._last = self.sharding, last
        if sharding.stage < 3 or (sharding.ranks == 1 and not sharding.offloads_weights):
            return
        layers = self.layer_elements()
        block = max((count for layer, count in layers.items() if layer is not None), default=0)
        outside = max(weight.numel for layer, weight in self.weights.ordered if layer is None)
        whole = min(self.elements, max(live_elements(block), outside))
        self._gathered.append(self.tape.storage(whole * self.size, f"weights{GATHERING}"))
        self.tape.scratch(AHEAD_BLOCKS * block * self.size, stream=GATHERING)
        if sharding.ranks > 1:
            coming = min(whole, PREFETCH_BUCKET_ELEMENTS) * self.size
            self._gathered.append(self.tape.storage(coming, f"communication{GATHERING}"))

    def take(self, gradient: Tensor) -> bool:
        """Whether a gradient that has come is copied into the bucket and let go.

        From stage 2 on in every pass; in stage 1 in the last one, while the pass goes on only where
        reducing overlaps with it (stage_1_and_2.py, process_gradients). The first one of a pass brings
        the bucket into being (setup_buckets), and the room for the rank's share of all.
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
            self._send_to_host(share(gradient.numel, sharding.ranks))
        return taken

    def _send_to_host(self, elements: int) -> None:
        """A gradient is measured in fp64 and brought to fp32.

        Stage 3 does so with a copy that was on the host already, part by part (stage3.py, partition_grads and
        _constant_buffered_norm2).
        """
        copy, part = None, elements
        if self.sharding.stage == 3:
            copy = self.tape.storage(elements * self.size, f"temporary{REDUCING}")
            part = min(elements, NORM_PART_ELEMENTS)
        self.tape.scratch(part * NORM_BYTES, stream=REDUCING)
        self.tape.scratch(elements * DType.FP32.size, stream=REDUCING)
        del copy

    def hold_gradients(self) -> None:
        """The rank's share of the gradients, which stays until the step, unless the host has it.

        It is taken on the stream that reduces (stage_1_and_2.py, copy_grads_in_partition).
        """
        if self.sharding.stage == 3 or self._partition or self.sharding.offloads_optimizer:
            return
        kind = f"gradients{REDUCING}" if self.sharding.overlaps else "gradients"
        held = share(self.elements, self.sharding.ranks) * self.size
        self.tape.enter(None)
        self._partition.append(self.tape.storage(held, kind))

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
        """Two moments in fp32 of all that the optimizer sees, unless the host holds them."""
        for flat in () if self.sharding.offloads_optimizer else self.flats():
            self._hold_moments(flat)

    def _hold_moments(self, elements: int) -> None:
        for _ in ("exp_avg", "exp_avg_sq"):
            self._hold(elements * DType.FP32.size, "optimizer")

    def flats(self) -> list[int]:
        """Elements of the tensors that the optimizer sees: the rank's share, under stage 3 its groups."""
        ranks = self.sharding.ranks
        if self.sharding.stage < 3:
            return [share(sum(group), ranks) for group in self.groups if group]
        return [
            flat
            for group in self.groups
            for flat in sub_groups([share(numel, ranks) for numel in group], SUB_GROUP_ELEMENTS)
        ]

    def update(self, *, first: bool) -> None:
        """The optimizer's step on the rank's share: gradients in fp64 for the norm, then flat in fp32.

        The first step takes the moments while those are there (stage_1_and_2.py, step).
        """
        if self.sharding.offloads_optimizer:
            return
        mine = share(self.elements, self.sharding.ranks)
        self.tape.scratch(share(max(self.numels), self.sharding.ranks) * NORM_BYTES)
        for flat in self.flats():
            low = self.tape.storage(flat * self.size, "temporary")
            gradient = self.tape.storage(flat * DType.FP32.size, "temporary")
            del low
            if first:
                self._hold_moments(flat)
            del gradient
        held = Tensor((mine,), DType.FP32, self.tape.storage(0))
        self.tape.pointwise("adamw", [held] * 7)
        self._partition.clear()
