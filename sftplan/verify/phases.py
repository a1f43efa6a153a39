"""What each phase of a step takes: seconds of the device between marks, the most memory inside.

The step calls a mark where a phase begins. Clocks record CUDA events and never wait for the device;
the memory watch asks PyTorch's allocator, which knows on the host what is allocated.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

END = "end"
DATA = "data"


@dataclass(slots=True)
class Clock:
    """Times of the phases of many steps; on a processor, of the host."""

    device: torch.device
    steps: list[list[tuple[str, Any]]] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)

    def begin(self, waited_s: float) -> None:
        """A step comes; the host waited so long for its data."""
        self.steps.append([])
        self.waits_s.append(waited_s)

    def mark(self, phase: str) -> None:
        """`phase` begins."""
        self.steps[-1].append((phase, self._now()))

    def drop(self, count: int) -> None:
        """The first steps were not steady ones."""
        del self.steps[:count], self.waits_s[:count]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between_s(self, start: Any, stop: Any) -> float:
        """Seconds between two marks."""
        if self.device.type != "cuda":
            return float(stop - start)
        return float(start.elapsed_time(stop)) / 1e3

    def step_seconds(self) -> list[float]:
        """From the end of a step to the end of the next one: what training would see."""
        ends = [marks[-1][1] for marks in self.steps]
        return [self.between_s(a, b) for a, b in pairwise(ends)]


def phase_seconds(clocks: Sequence[Clock]) -> dict[str, float]:
    """Median seconds of each phase, all passes of a step together; call it when all is done."""
    found: dict[str, list[float]] = {DATA: [wait for clock in clocks for wait in clock.waits_s[1:]]}
    for clock in clocks:
        for marks in clock.steps[1:]:
            sums: dict[str, float] = {}
            for (phase, start), (_, stop) in pairwise(marks):
                sums[phase] = sums.get(phase, 0.0) + clock.between_s(start, stop)
            for phase, seconds in sums.items():
                found.setdefault(phase, []).append(seconds)
    return {phase: statistics.median(values) for phase, values in found.items() if values}


@dataclass(slots=True)
class MemoryWatch:
    """The most bytes allocated in each phase. Peaks of the allocator start anew at every mark."""

    device: torch.device
    phase: str = "start"
    peaks: dict[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0

    def mark(self, phase: str) -> None:
        """`phase` begins, another one ends."""
        self.settle()
        self.phase = phase

    def settle(self) -> None:
        """Take down the peak since the last mark."""
        if self.device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self.device)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self.device))
        self.peaks[self.phase] = max(peak, self.peaks.get(self.phase, 0))
        torch.cuda.reset_peak_memory_stats(self.device)

    def restart(self) -> None:
        """What was seen so far is not of a steady step."""
        self.peaks.clear()
        self.reserved_bytes = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def allocated_bytes(self) -> int | None:
        """The peak of all phases; None on a processor."""
        return max(self.peaks.values(), default=None)


@dataclass(slots=True)
class Place:
    """Where a step is: what an out-of-memory error has to say."""

    phase: str = "building the model"
    step: int = 0

    def mark(self, phase: str) -> None:
        """`phase` begins."""
        self.phase = phase
