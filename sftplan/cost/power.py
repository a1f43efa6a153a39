"""The clock that a GPU's power limit allows while tensor cores are busy.

A chip runs at its highest clock until it would draw more than its limit. What a FLOP takes goes with the
square of the voltage, and the voltage with the clock, so that F FLOP/s at the clock φ (of the highest) draw
F·φ², and a limit that F₀ reaches at the highest clock lets

    F·φ² = F₀

Seventeen training steps on one H200 (700 W, driver 580, 2026-11-27), from 81 to 467 TFLOP/s, at 1,980 to
1,675 MHz as NVML tells: with F₀ = 335 TFLOP/s all clocks are met within 3 %, 1.2 % RMS; eleven on one H100,
which was fitted to nothing, within 5 %.
"""

from __future__ import annotations

ROUNDS = 40  # bisections: 1e-12 of the clock


def clock_fraction(
    tensor_flops: float, compute_s: float, step_s: float, power_flops_per_s: float | None
) -> float:
    """φ of a step with so many FLOPs on tensor cores, which take `compute_s` of its `step_s` seconds at φ = 1.

    At φ the step takes t(φ) = step - compute + compute / φ, and φ² = F₀·t(φ) / FLOPs. Without a limit that is
    known, or below it, 1.

    >>> clock_fraction(100e12, 0.2, 0.3, 335e12)  # 333 TFLOP/s
    1.0
    >>> φ = clock_fraction(100e12, 0.1, 0.2, 335e12)  # 500 TFLOP/s at the highest clock
    >>> round(φ, 3), round(100e12 / (0.1 + 0.1 / φ) * φ**2 / 335e12, 6)
    (0.853, 1.0)
    """
    if power_flops_per_s is None or tensor_flops <= power_flops_per_s * step_s:
        return 1.0
    others_s = step_s - compute_s
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        clock = (low + high) / 2
        drawn = tensor_flops * clock**3
        if drawn > power_flops_per_s * (others_s * clock + compute_s):
            high = clock
        else:
            low = clock
    return high
