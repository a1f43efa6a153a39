"""The passes of a step as its tape has them: read once, then priced once for each GPU.

What the host does is the same whichever GPU is beside it, and most layers launch the same kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftplan.cost import dispatch
from sftplan.cost.clocks import Segment
from sftplan.cost.kernels import COMPUTE_KINDS, fraction, kernel_s
from sftplan.step.leaves import ACCUMULATE
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sftplan.cost.device import Device
    from sftplan.step.tape import Tape
    from sftplan.step.work import Work

    Kernels = tuple[tuple[Work, int], ...]  # each with how often it is launched


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward and backward of one micro-batch on one GPU; of each segment its seconds, all times together."""

    segments: tuple[Segment, ...]
    compute_s: tuple[float, ...]
    memory_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A segment before it is priced, on the host that all others are compared with."""

    phase: str
    times: int
    eager_s: float
    compiled_s: float
    kernels: Kernels
    num_kernels: int
    tensors: int
    modules: int


class Passes:
    """The last step on a tape; `multiplicity` tells for how many layers a layer of the tape stands.

    `weight_bytes` are the whole model's, `share` is them over those of the tape's layers; `tensors` the
    gradients of a pass.
    """

    def __init__(self, tape: Tape, multiplicity: Mapping[int, int]) -> None:
        passes, update = _step(tape)
        self._distinct: dict[Kernels, Kernels] = {}
        self._passes = [
            [self._stretch(tape, number, multiplicity) for number in numbers] for numbers in passes
        ]
        if any(work.kind == ACCUMULATE for s in self._passes[0] for work, _ in s.kernels):
            self._passes.insert(0, [self._first(stretch) for stretch in self._passes[0]])
        self._works = [work for number in update for work in tape.works[number][1].items()]
        self.weight_bytes = _weight_bytes(tape, multiplicity)
        self.share = self.weight_bytes / _weight_bytes(tape, {})
        self.tensors = sum(s.tensors * s.times for s in self._passes[-1])
        self._tensor_flops = [_tensor_flops(stretches) for stretches in self._passes]
        self._priced: dict[tuple[Device, bool, bool], list[Pass]] = {}

    def _stretch(self, tape: Tape, number: int, multiplicity: Mapping[int, int]) -> _Stretch:
        (label, works), hosts = tape.works[number], tape.hosts[number]
        phase, _, layer = label.partition(" ")
        kernels = tuple(works.items())
        num_kernels = sum(works.values())
        if phase == "forward":
            host = dispatch.forward_s(hosts) + (0.0 if layer else dispatch.MODEL_FORWARD_S)
        else:
            host = dispatch.backward_s(hosts, num_kernels)
            host += 0.0 if layer else dispatch.MODEL_BACKWARD_S
        compiled = dispatch.compiled_s(hosts)
        return _Stretch(
            phase=phase,
            times=multiplicity.get(int(layer), 1) if layer.isdigit() else 1,
            eager_s=host - compiled,
            compiled_s=compiled,
            kernels=self._distinct.setdefault(kernels, kernels),
            num_kernels=num_kernels,
            tensors=hosts["AccumulateGrad*"],
            modules=dispatch.num_modules(hosts),
        )

    def _first(self, stretch: _Stretch) -> _Stretch:
        """As it is in a step's first pass."""
        kernels = tuple(each for each in stretch.kernels if each[0].kind != ACCUMULATE)
        return replace(
            stretch,
            kernels=self._distinct.setdefault(kernels, kernels),
            num_kernels=sum(count for _, count in kernels),
        )

    def priced(self, device: Device, *, drops: bool, captured: bool) -> list[Pass]:
        """The passes on a device; `drops`: the attention does, `captured`: kernels need no host."""
        key = (device, drops, captured)
        if key not in self._priced:
            busy = {
                id(each): _busy(each, device, drops=drops, captured=captured)
                for each in self._distinct
            }
            self._priced[key] = [
                _pass(
                    _segment(s, busy[id(s.kernels)], device, captured=captured) for s in stretches
                )
                for stretches in self._passes
            ]
        return self._priced[key]

    def tensor_flops(self, accumulation: int) -> int:
        """Of products and attention in 16 bits, which tensor cores do, in a step of so many passes."""
        first = self._tensor_flops
        return sum(first) + first[-1] * (accumulation - len(first))

    def update_s(self, bytes_per_s: float) -> dict[str, float]:
        """Seconds of what follows the passes, by kind: foreach kernels, so bytes count, not launches."""
        seconds: dict[str, float] = {}
        for work, count in self._works:
            took = self.share * count * work.nbytes / (bytes_per_s * fraction(work))
            seconds[work.kind] = seconds.get(work.kind, 0.0) + took
        return seconds


def _tensor_flops(stretches: Iterable[_Stretch]) -> int:
    return sum(
        stretch.times * count * work.flops
        for stretch in stretches
        for work, count in stretch.kernels
        if work.kind in COMPUTE_KINDS and work.dtype is not DType.FP32  # torch's default: no TF32
    )


def _segment(
    stretch: _Stretch, busy_s: tuple[float, float], device: Device, *, captured: bool
) -> Segment:
    eager, compiled = device.dispatch_scale, device.compiled_dispatch_scale
    host_s = stretch.eager_s * eager + stretch.compiled_s * compiled
    return Segment(
        phase=stretch.phase,
        times=stretch.times,
        host_s=0.0 if captured else host_s,
        compute_s=busy_s[0],
        memory_s=busy_s[1],
        kernels=stretch.num_kernels,
        tensors=stretch.tensors,
        modules=stretch.modules,
    )


def _pass(segments: Iterable[Segment]) -> Pass:
    held = tuple(segments)
    return Pass(
        segments=held,
        compute_s=tuple(s.compute_s * s.times for s in held),
        memory_s=tuple(s.memory_s * s.times for s in held),
    )


def _busy(kernels: Kernels, device: Device, *, drops: bool, captured: bool) -> tuple[float, float]:
    """Seconds of kernels bound by arithmetic, and of the others."""
    compute = memory = 0.0
    for work, count in kernels:
        seconds = count * kernel_s(work, device, dropout=drops, captured=captured)
        if work.kind in COMPUTE_KINDS:
            compute += seconds
        else:
            memory += seconds
    return compute, memory


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


def _weight_bytes(tape: Tape, multiplicity: Mapping[int, int]) -> int:
    """Bytes of the weights that the model is built with, each layer of the tape for all it stands for."""
    return sum(
        size * (1 if owner is None else multiplicity.get(owner, 1))
        for owner, size in tape.weight_bytes.items()
    )
