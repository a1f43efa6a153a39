"""Seconds of one optimizer step, read off its tape: what the GPU works, what the host dispatches.

Both clocks run side by side: the host issues operations, the GPU takes each when it is issued and the one before
is done. Small batches end with the host's clock, large ones with the GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from sftplan.cost import comm, deepspeed, dispatch
from sftplan.cost.clocks import Clocks
from sftplan.cost.device import device_of
from sftplan.cost.estimate import StepTime
from sftplan.cost.power import clock_fraction
from sftplan.cost.transfers import Transfers
from sftplan.facts.captured import attention_dropout
from sftplan.facts.largest import largest_weight
from sftplan.facts.strategy import Attention, Offload, Precision

if TYPE_CHECKING:
    from sftplan.cost.device import Device
    from sftplan.cost.passes import Pass, Passes
    from sftplan.facts.hardware import Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy

# Compiling block by block: the first step of gpt2-large takes 13 s (H200, torch 2.11, 2026-11), 72 to 78 s whole.
COMPILE_S = 13.0
LOW_WEIGHTS = (Precision.BF16_TRUE, Precision.BF16_MASTER)


def startup_s(strategy: Strategy) -> float:
    """Seconds before the first step runs as all later ones do: compilation."""
    return COMPILE_S if strategy.compile else 0.0


def time_of(
    passes: Passes,
    strategy: Strategy,
    model: ModelShape,
    hardware: Hardware,
    *,
    captured: bool = False,
    waits_for_mask: bool = False,
) -> StepTime:
    """Seconds of one step of these passes.

    step = compute + memory + dispatch + optimizer + communication + offload: the kernels of all passes that
    are bound by arithmetic and by memory; what the passes take beyond them, waiting for the host;
    from the last gradient to the end; and of transfers only what nothing hides. Products and attention run at the
    clock that the power limit allows. The tape is one rank's without sharding; `strategy.zero` and
    `.offload` move the optimizer and add transfers. `captured` passes are CUDA graphs; the host
    `waits_for_mask` before each pass.
    """
    device = _device(strategy, hardware)
    drops = attention_dropout(strategy, model) > 0
    priced = passes.priced(device, drops=drops, captured=captured)
    priced = priced + [priced[-1]] * (strategy.accumulation - len(priced))
    job = _Job(passes, strategy, model, hardware, device, priced, captured, waits_for_mask)
    highest = job.time(clock=1.0)
    flops = passes.tensor_flops(strategy.accumulation)
    assert highest.compute_s is not None
    assert highest.step_s is not None
    clock = clock_fraction(flops, highest.compute_s, highest.step_s, device.power_flops_per_s)
    return highest if clock == 1.0 else job.time(clock=clock)


@dataclass(frozen=True, slots=True)
class _Job:
    """A step on a device, its passes priced at the highest clock."""

    passes: Passes
    strategy: Strategy
    model: ModelShape
    hardware: Hardware
    device: Device
    priced: list[Pass]
    captured: bool
    waits_for_mask: bool

    def time(self, *, clock: float) -> StepTime:
        """Seconds at that share of the highest clock."""
        passes, strategy, hardware, device = self.passes, self.strategy, self.hardware, self.device
        clocks = Clocks(clock=clock)
        walls = {"forward": 0.0, "backward": 0.0}
        for one in self.priced:
            if self.waits_for_mask:
                clocks.meet()
            for segment in deepspeed.hooked(one.segments, strategy, device.dispatch_scale):
                walls[segment.phase] += clocks.run(segment)
        passed = clocks.gpu_s
        compute = sum(chain.from_iterable(one.compute_s for one in self.priced)) / clock
        memory = sum(chain.from_iterable(one.memory_s for one in self.priced))
        parameters = passes.weight_bytes / weight_size(strategy.precision)
        updated = _Update(passes, parameters, strategy, device).run(
            clocks,
            hardware.num_gpus,
            scaler=strategy.precision is Precision.FP16_MIXED and not self.captured,
        )
        transfers = Transfers(
            passes.weight_bytes, parameters, largest_weight(self.model), strategy, hardware, walls
        )
        communication, offload = transfers.communication_s(), transfers.offload_s()
        passed += deepspeed.passes_s(strategy, passes.tensors * device.dispatch_scale)
        waited = passed - compute - memory
        return StepTime(
            step_s=passed + updated + communication + offload,
            compute_s=compute,
            memory_s=memory,
            dispatch_s=0.0 if self.captured else waited,  # not what rounding leaves
            communication_s=communication,
            offload_s=offload,
            optimizer_s=updated,
            startup_s=startup_s(strategy),
        )


def weight_size(precision: Precision) -> int:
    """Bytes of a weight."""
    return 2 if precision in LOW_WEIGHTS else comm.FP32_BYTES


def _device(strategy: Strategy, hardware: Hardware) -> Device:
    device = device_of(hardware)
    varlen = strategy.attention is Attention.VARLEN  # has a kernel of its own
    return replace(device, has_cudnn_attention=False) if varlen else device


class _Update:
    """Clipping and the optimizer."""

    def __init__(
        self, passes: Passes, parameters: float, strategy: Strategy, device: Device
    ) -> None:
        self.strategy = strategy
        self.device = device
        self.tensors = passes.tensors * device.dispatch_scale
        self.parameters = parameters
        self.seconds = passes.update_s(device.bytes_per_s)

    def run(self, clocks: Clocks, ranks: int, *, scaler: bool) -> float:
        """Seconds from the last gradient to the end of the step, on this GPU and its host.

        A `scaler` unscales gradients by itself; our own step leaves that to AdamW's kernel.
        What is offloaded is clipped and moved on the host: `Transfers` counts it.
        """
        strategy, passed = self.strategy, clocks.gpu_s
        offloads = strategy.offload is not Offload.NONE
        adamw = self.seconds.pop("adamw", 0.0)
        if scaler:  # gradients read and written: 2 of AdamW's 7
            clocks.host_s += self.tensors * dispatch.SCALER_TENSOR_S
            clocks.gpu_s = max(clocks.gpu_s, clocks.host_s) + adamw * 2 / 7
            clocks.host_s = clocks.gpu_s  # step() waits for the check
        if strategy.max_grad_norm and not offloads:
            clocks.host_s += self.tensors * dispatch.CLIP_TENSOR_S
            clocks.gpu_s = max(clocks.gpu_s, clocks.host_s)
        if not offloads:
            clocks.gpu_s += sum(self.seconds.values()) / (ranks if strategy.zero >= 2 else 1)
            clocks.host_s += self.tensors * dispatch.ADAMW_TENSOR_S
            clocks.gpu_s = max(clocks.gpu_s, clocks.host_s)
            clocks.gpu_s += adamw / (ranks if strategy.zero else 1)
        mine, rate = self.parameters / ranks, self.device.bytes_per_s
        clocks.gpu_s += deepspeed.update_s(strategy, self.tensors, mine, rate, ranks=ranks)
        clocks.host_s += self.tensors * dispatch.ZERO_GRAD_TENSOR_S
        return max(clocks.gpu_s, clocks.host_s) - passed
