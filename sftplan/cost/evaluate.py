"""Everything that a strategy costs: one tape, read for memory, time and work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sftplan.cost.compute import attention_flops_per_token, linear_flops_per_token
from sftplan.cost.estimate import Compute, Estimate, GpuMemory, StepTime
from sftplan.cost.host import host_memory
from sftplan.cost.memory import exact_peaks
from sftplan.cost.outside import graphs_bytes, nccl_bytes
from sftplan.cost.rows import examples_per_step, tokens_per_step
from sftplan.cost.tapes import Tapes, ranks
from sftplan.cost.time import time_of
from sftplan.facts.captured import is_captured, waits_for_mask
from sftplan.facts.strategy import Allocator, Offload
from sftplan.step.batch import full_batch
from sftplan.step.chip import BEFORE_HOPPER, HOPPER, Chip
from sftplan.step.few import few_layers, shallower
from sftplan.step.repeat import Events, expand
from sftplan.step.sharding import sharding_saves_bytes
from sftplan.step.simulate import STEADY_PASSES, simulate

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.cost.memory import Peaks
    from sftplan.facts.hardware import Gpu, Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload
    from sftplan.step.traced import Tracer

HOPPER_CAPABILITY = 9.0
QUICK_LAYERS = 8
QUICK_RATIO = 4


def chip_of(gpu: Gpu) -> Chip:
    """What a GPU's kernels allocate by."""
    capability = gpu.compute_capability
    recent = capability is not None and capability >= HOPPER_CAPABILITY
    return HOPPER if recent else BEFORE_HOPPER


def _speed_key(hardware: Hardware) -> tuple[object, ...]:
    """All that a step's time depends on; offers of several clouds share it."""
    rates = hardware.rates
    return (
        hardware.gpu.name,
        hardware.gpus_per_node,
        hardware.num_nodes,
        hardware.internode_bytes_per_s,
        rates.matmul_fraction,
        rates.hbm_fraction,
        rates.dispatch_scale,
        rates.compiled_dispatch_scale,
        rates.allreduce_fraction,
        rates.allgather_fraction,
        rates.reducescatter_fraction,
        rates.pcie_fraction,
        rates.host_bytes_per_s,
        rates.cpu_adam_bytes_per_s,
    )


class Evaluator:
    """Costs of one model and workload on so many GPUs.

    What depends on the strategy alone is computed once, however many GPU models ask for it. `quick`
    replays the allocator on few layers only and takes its share of reserve from there, which errs
    on the side of more.
    """

    def __init__(
        self,
        model: ModelShape,
        workload: Workload,
        *,
        num_gpus: int,
        gpus_per_node: int,
        quick: bool = False,
        tapes: Tapes | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.model = model
        self.tapes = tapes or Tapes(model, workload, tracer=tracer)
        self.quick = quick
        self.workload = workload
        self.num_gpus = num_gpus
        self.gpus_per_node = gpus_per_node
        self._times: dict[tuple[Strategy, tuple[object, ...]], StepTime] = {}
        self._allocated: dict[tuple[Strategy, Chip], int] = {}
        self._shallow: dict[tuple[Strategy, Chip], Peaks] = {}

    def bound_bytes(self, strategy: Strategy, hardware: Hardware) -> int:
        """Memory used if the allocator lost nothing by splitting; bytes."""
        return self._bound(strategy, chip_of(hardware.gpu)) + self._outside_bytes(
            strategy, hardware
        )

    def _bound(self, strategy: Strategy, chip: Chip) -> int:
        if self.quick:
            return self._quick_bound(replace(strategy, allocator=Allocator.EXPANDABLE))
        return self._simulated_bound(strategy, chip)

    def _simulated_bound(self, strategy: Strategy, chip: Chip) -> int:
        key = (strategy, chip)
        if key not in self._allocated:
            self._allocated[key] = self.tapes.allocated_bytes(strategy, chip, self.num_gpus)
        return self._allocated[key]

    def _quick_bound(self, strategy: Strategy) -> int:
        """Between micro-batches of 1, 4, 16 ... rows on the chord: peaks are convex, so not below.

        The same where only some layers are checkpointed.
        """
        if strategy.checkpointed_layers is not None:
            return round(self._between(strategy, self._quick_bound))
        if strategy.zero and strategy.offload is Offload.NONE:
            whole = self._quick_bound(replace(strategy, zero=0))
            return whole - sharding_saves_bytes(self.model, strategy, self.num_gpus)
        rows = strategy.micro_batch
        below = 1
        while below * QUICK_RATIO <= rows:
            below *= QUICK_RATIO
        many = min(strategy.accumulation, STEADY_PASSES)
        ends = [
            self._simulated_bound(replace(strategy, micro_batch=size, accumulation=many), HOPPER)
            for size in ((below,) if below == rows else (below, below * QUICK_RATIO))
        ]
        slope = (ends[-1] - ends[0]) / (below * (QUICK_RATIO - 1))
        return ends[0] + round(slope * (rows - below))

    def step_seconds(self, strategy: Strategy, hardware: Hardware) -> float:
        """Seconds of one optimizer step; each layer that is checkpointed adds the same."""
        if strategy.checkpointed_layers is not None:
            return self._between(strategy, lambda whole: self.step_seconds(whole, hardware))
        seconds = self._time(strategy, hardware).step_s
        assert seconds is not None
        return seconds

    def _between(self, strategy: Strategy, figure: Callable[[Strategy], float]) -> float:
        """On the chord from no layer checkpointed to all."""
        share = (strategy.checkpointed_layers or 0) / self.model.num_layers
        every = replace(strategy, checkpointed_layers=None)
        none = replace(every, checkpointing=strategy.checkpointing.lighter)
        return (1 - share) * figure(none) + share * figure(every)

    def _time(self, strategy: Strategy, hardware: Hardware) -> StepTime:
        """Sharding and the chip change who holds what, not the work: one tape serves all."""
        key = (strategy, _speed_key(hardware))
        if key not in self._times:
            alike = replace(strategy, zero=0, offload=Offload.NONE)
            passes = self.tapes.passes(alike, HOPPER, self.num_gpus)
            self._times[key] = time_of(
                passes, strategy, self.model, hardware, captured=self._captured(strategy),
                waits_for_mask=waits_for_mask(strategy, self.model, self.workload.seq_len),
            )  # fmt: skip
        return self._times[key]

    def _captured(self, strategy: Strategy) -> bool:
        return is_captured(strategy, self.model, self.workload.seq_len)

    def estimate(self, strategy: Strategy, hardware: Hardware) -> Estimate:
        """Everything, with the allocator replayed."""
        return self._estimate(strategy, hardware, self._memory(strategy, hardware))

    def beside(self, known: Estimate, strategy: Strategy, hardware: Hardware) -> Estimate:
        """Everything of a strategy much like a known one: it reserves as much beyond what it allocates.

        The allocated peak is the strategy's own; categories are left out.
        """
        used = self.bound_bytes(strategy, hardware)
        allocated = used - self._outside_bytes(strategy, hardware)
        beyond = known.memory.peak_reserved_bytes - known.memory.peak_allocated_bytes
        memory = replace(
            known.memory,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=allocated + beyond,
            used_bytes=used + beyond,
            by_category={},
        )
        return self._estimate(strategy, hardware, memory)

    def _estimate(self, strategy: Strategy, hardware: Hardware, memory: GpuMemory) -> Estimate:
        rows = strategy.micro_batch * strategy.accumulation * self.num_gpus
        return Estimate(
            memory=memory,
            host=host_memory(self.model, strategy, self.num_gpus, self.gpus_per_node),
            compute=self._compute(strategy, rows),
            time=self._time(strategy, hardware),
            tokens_per_step=tokens_per_step(strategy, self.workload, rows),
            examples_per_step=examples_per_step(strategy, self.workload, rows),
            rows_per_step=rows,
        )

    def _memory(self, strategy: Strategy, hardware: Hardware) -> GpuMemory:
        key = (strategy, chip_of(hardware.gpu))
        if self.quick:
            many = min(strategy.accumulation, STEADY_PASSES)
            key = (replace(strategy, accumulation=many), HOPPER)
        place = (*key, ranks(strategy, self.num_gpus), self.quick)
        if place not in self.tapes.peaks:
            peaks_of = self._quick_peaks if self.quick else self._exact_peaks
            self.tapes.peaks[place] = peaks_of(*key)
        peaks = self.tapes.peaks[place]
        idle = max(hardware.gpu.unusable_bytes, hardware.rates.device_bytes)
        return GpuMemory(
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            context_bytes=self._context_bytes(strategy, hardware),
            used_bytes=peaks.reserved_bytes + self._outside_bytes(strategy, hardware),
            capacity_bytes=max(0, hardware.gpu.memory_bytes - idle - hardware.memory_taken_bytes),
            peak_at=peaks.at,
            by_category=peaks.by_category,
        )

    def _exact_peaks(self, strategy: Strategy, chip: Chip) -> Peaks:
        return self._peaks(self.model, strategy, chip)

    def _peaks(self, model: ModelShape, strategy: Strategy, chip: Chip) -> Peaks:
        return exact_peaks(
            self._events(model, strategy, chip),
            expandable=strategy.allocator is Allocator.EXPANDABLE,
            captured=self._captured(strategy),
        )

    def _quick_peaks(self, strategy: Strategy, chip: Chip) -> Peaks:
        """With the share of reserve of few layers, all of them checkpointed alike."""
        alike = replace(strategy, checkpointed_layers=None), chip
        if alike not in self._shallow:
            shallow = shallower(self.model, self.workload.seq_len, QUICK_LAYERS)
            self._shallow[alike] = self._peaks(shallow, *alike)
        few, allocated = self._shallow[alike], self._bound(strategy, chip)
        return replace(
            few,
            allocated_bytes=allocated,
            reserved_bytes=allocated * few.reserved_bytes // few.allocated_bytes,
            by_category={},
        )

    def events(self, strategy: Strategy, chip: Chip) -> Events:
        """Every birth and death of a storage in the first two steps."""
        return self._events(self.model, strategy, chip)

    def _events(self, model: ModelShape, strategy: Strategy, chip: Chip) -> Events:
        few = few_layers(model, strategy, self.workload.seq_len)
        tape = simulate(
            few.model, few.strategy, full_batch(strategy, self.workload), num_gpus=self.num_gpus,
            chip=chip, times=few.times, tracer=self.tapes.tracer,
        )  # fmt: skip
        if not few.times:
            return Events(tape.events, tape.sizes, tape.kinds, tape.marks)
        return expand(tape, few.times)

    def _outside_bytes(self, strategy: Strategy, hardware: Hardware) -> int:
        """What the driver shows beyond the allocator's reserve."""
        return self._context_bytes(strategy, hardware) + nccl_bytes(strategy, self.num_gpus)

    def _context_bytes(self, strategy: Strategy, hardware: Hardware) -> int:
        graphs = graphs_bytes(strategy, self.num_gpus, captured=self._captured(strategy))
        return hardware.rates.context_bytes + graphs

    def _compute(self, strategy: Strategy, rows: int) -> Compute:
        linear = linear_flops_per_token(self.model)
        attention = attention_flops_per_token(self.model, self.workload.seq_len)
        per_token = linear + attention
        tokens = tokens_per_step(strategy, self.workload, rows)
        return Compute(
            flops_per_token=per_token,
            linear_flops_per_token=linear,
            attention_flops_per_token=attention,
            step_flops=round(per_token * tokens),
        )
