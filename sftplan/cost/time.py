"""Seconds of one optimizer step, read off its tape: what the GPU works, what the host dispatches.

Both clocks run side by side: the host issues operations, the GPU takes each when it is issued and the one before
is done. Small batches end with the host's clock, large ones with the GPU's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sftplan.cost import comm, deepspeed, dispatch
from sftplan.cost.clocks import Clocks, Segment
from sftplan.cost.device import device_of
from sftplan.cost.estimate import StepTime
from sftplan.cost.kernels import COMPUTE_KINDS, fraction, kernel_s
from sftplan.cost.transfers import Transfers
from sftplan.facts.largest import largest_weight
from sftplan.facts.strategy import Attention, Offload, Precision, is_captured

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    from sftplan.cost.device import Device
    from sftplan.facts.hardware import Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload
    from sftplan.step.tape import Tape, Work

# Compiling block by block: the first step of gpt2-large takes 13 s (H200, torch 2.11, 2026-11), 72 to 78 s whole.
COMPILE_S = 13.0
LOW_WEIGHTS = (Precision.BF16_TRUE, Precision.BF16_MASTER)


def startup_s(strategy: Strategy) -> float:
    """Seconds before the first step runs as all later ones do: compilation."""
    return COMPILE_S if strategy.compile else 0.0


def step_time(
    tape: Tape,
    multiplicity: Mapping[int, int],
    strategy: Strategy,
    workload: Workload | None,
    model: ModelShape,
    hardware: Hardware,
) -> StepTime:
    """Seconds of one step. `multiplicity` tells for how many layers a layer of the tape stands.

    step = compute + memory + dispatch + optimizer + communication + offload: the kernels of all passes that
    are bound by arithmetic and by memory; what the passes take beyond them, waiting for the host;
    from the last gradient to the end; and of transfers only what nothing hides. The tape is one
    rank's without sharding; `strategy.zero` and `.offload` move the optimizer and add transfers.
    """
    device = _device(strategy, hardware)
    passes, numbers = _step(tape)
    drops = _attention_drops(strategy, model)
    priced = [_segments(tape, one, multiplicity, device, drops=drops) for one in passes]
    priced += [priced[-1]] * (strategy.accumulation - len(priced))
    busy = [segment for one in priced for segment in one]
    if is_captured(strategy):  # kernels follow each other without the host
        busy = [replace(segment, host_s=0.0) for segment in busy]
    busy = deepspeed.hooked(busy, strategy, device.dispatch_scale)
    clocks = Clocks()
    walls = {"forward": 0.0, "backward": 0.0}
    for segment in busy:
        walls[segment.phase] += clocks.run(segment)
    passed = clocks.gpu_s
    compute = sum(s.compute_s * s.times for s in busy)
    memory = sum(s.memory_s * s.times for s in busy)
    weight_bytes = _weight_bytes(tape, multiplicity)
    share = weight_bytes / _weight_bytes(tape, None)
    tensors = sum(s.tensors * s.times for s in priced[-1])
    parameters = weight_bytes / weight_size(strategy.precision)
    update = _Update(tape, numbers, share, tensors, parameters, strategy, device)
    updated = update.run(clocks, hardware.num_gpus)
    transfers = Transfers(
        weight_bytes, parameters, largest_weight(model), strategy, hardware, walls
    )
    communication, offload = transfers.communication_s(), transfers.offload_s()
    passed += deepspeed.passes_s(strategy, tensors * device.dispatch_scale)
    return StepTime(
        step_s=passed + updated + communication + offload,
        compute_s=compute,
        memory_s=memory,
        dispatch_s=passed - compute - memory,
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


def _attention_drops(strategy: Strategy, model: ModelShape) -> bool:
    chosen = strategy.attention_dropout
    return (model.attention_dropout if chosen == "model" else chosen) > 0


def _step(tape: Tape) -> tuple[list[list[int]], list[int]]:
    """Numbers of the segments of each pass of the last step on the tape, and of what follows them."""
    labels = [label for label, _ in tape.works]
    start = labels.index("settled") if "settled" in labels else labels.index("zero_grad")
    passes: list[list[int]] = []
    update: list[int] = []
    for number in range(start + 1, len(labels)):
        label = labels[number]
        if label == "forward":
            passes.append([])
        phase = label.partition(" ")[0]
        if phase in ("forward", "backward"):
            passes[-1].append(number)
        else:
            update.append(number)
    return passes, update


def _segments(
    tape: Tape, numbers: list[int], multiplicity: Mapping[int, int], device: Device, *, drops: bool
) -> list[Segment]:
    out = []
    for number in numbers:
        label, works = tape.works[number]
        phase, _, layer = label.partition(" ")
        times = multiplicity.get(int(layer), 1) if layer.isdigit() else 1
        compute, memory, kernels = _busy(works, device, drops=drops)
        hosts = tape.hosts[number]
        if phase == "forward":
            host = dispatch.forward_s(hosts) + (0.0 if layer else dispatch.MODEL_FORWARD_S)
        else:
            host = dispatch.backward_s(hosts, kernels)
        compiled = dispatch.compiled_s(hosts)
        host = (host - compiled) * device.dispatch_scale + compiled * device.compiled_dispatch_scale
        tensors, modules = hosts["AccumulateGrad*"], dispatch.num_modules(hosts)
        out.append(Segment(phase, times, host, compute, memory, kernels, tensors, modules))
    return out


def _busy(works: Counter[Work], device: Device, *, drops: bool) -> tuple[float, float, int]:
    """Seconds of kernels bound by arithmetic, seconds of the others, and how many kernels."""
    compute = memory = 0.0
    kernels = 0
    for work, count in works.items():
        seconds = count * kernel_s(work, device, dropout=drops)
        if work.kind in COMPUTE_KINDS:
            compute += seconds
        else:
            memory += seconds
        kernels += count
    return compute, memory, kernels


def _weight_bytes(tape: Tape, multiplicity: Mapping[int, int] | None) -> int:
    """Bytes of the weights that the model is built with, each layer of the tape for all it stands for."""
    times = multiplicity or {}
    return sum(
        size * (1 if owner is None else times.get(owner, 1))
        for owner, size in tape.weight_bytes.items()
    )


class _Update:
    """Clipping and the optimizer: foreach kernels over all tensors, so bytes count, not launches."""

    def __init__(
        self,
        tape: Tape,
        numbers: list[int],
        share: float,
        tensors: int,
        parameters: float,
        strategy: Strategy,
        device: Device,
    ) -> None:
        self.strategy = strategy
        self.device = device
        self.tensors = tensors * device.dispatch_scale
        self.parameters = parameters
        self.seconds: dict[str, float] = {}
        for number in numbers:
            for work, count in tape.works[number][1].items():
                rate = device.bytes_per_s * fraction(work)
                seconds = share * count * work.nbytes / rate
                self.seconds[work.kind] = self.seconds.get(work.kind, 0.0) + seconds

    def run(self, clocks: Clocks, ranks: int) -> float:
        """Seconds from the last gradient to the end of the step, on this GPU and its host.

        What is offloaded is clipped and moved on the host: `Transfers` counts it.
        """
        strategy, passed = self.strategy, clocks.gpu_s
        offloads = strategy.offload is not Offload.NONE
        adamw = self.seconds.pop("adamw", 0.0)
        if strategy.precision is Precision.FP16_MIXED:  # gradients read and written: 2 of AdamW's 7
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
        clocks.gpu_s += deepspeed.update_s(strategy, self.tensors, mine, rate)
        clocks.host_s += self.tensors * dispatch.ZERO_GRAD_TENSOR_S
        return max(clocks.gpu_s, clocks.host_s) - passed
