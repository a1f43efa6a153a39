"""The two clocks of a step: what the host has issued, what the GPU has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a pass, `times` over: seconds of the host, seconds and kernels of the GPU."""

    phase: str
    times: int
    host_s: float
    compute_s: float
    memory_s: float
    kernels: int
    tensors: int  # gradients that become ready in it
    modules: int = 0  # called in it, going forward or doing so again


@dataclass(slots=True)
class Clocks:
    """When the host has issued all so far, and when the GPU has done it; seconds from the step's start."""

    host_s: float = 0.0
    gpu_s: float = 0.0
    clock: float = 1.0  # of the highest, that products and attention run at

    def meet(self) -> None:
        """The host waits until the GPU has done all that was issued."""
        self.host_s = max(self.host_s, self.gpu_s)

    def run(self, segment: Segment) -> float:
        """Seconds that the GPU comes on by. Kernels are spread evenly over what the host issues.

        gpu = max(gpu + n·g, host + h/k + n·g, host + n·h + g/k)   n times, k kernels

        >>> clocks = Clocks()
        >>> clocks.run(Segment("forward", 10, 1.0, 4.0, 0.0, 4, 0))  # bound by the GPU
        40.25
        >>> (clocks.host_s, clocks.gpu_s)
        (10.0, 40.25)
        """
        host, before = segment.host_s * segment.times, self.gpu_s
        if segment.kernels:
            each = segment.compute_s / self.clock + segment.memory_s
            gpu = each * segment.times
            self.gpu_s = max(
                self.gpu_s + gpu,
                self.host_s + segment.host_s / segment.kernels + gpu,
                self.host_s + host + each / segment.kernels,
            )
        self.host_s += host
        return self.gpu_s - before
