"""The learning rate: linear warm-up, then cosine decay to a floor.

References:
    [SGDR] Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", eq. 5,
           without restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A pure function of the number of the step: resuming needs no state."""

    peak: float
    floor: float
    warmup_steps: int
    num_steps: int

    def __call__(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0.

        (k+1)/W·η in the warm-up of W steps, then η_min + (η − η_min)·(1 + cos πp)/2    [SGDR] eq. 5
        with p from 0 to exactly 1 at the last step.

        >>> rate = Schedule(peak=1.0, floor=0.1, warmup_steps=2, num_steps=7)
        >>> [round(rate(step), 4) for step in range(7)]
        [0.5, 1.0, 1.0, 0.8682, 0.55, 0.2318, 0.1]
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        last = max(self.num_steps - 1 - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / last, 1.0)
        if progress == 1.0:
            return self.floor  # exactly: cos π rounds to -1, the rest does not always cancel
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2
