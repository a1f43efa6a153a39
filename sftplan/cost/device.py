"""What one GPU reaches: the rates that kernels are timed with, from its datasheet and its fractions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware

# Products on an H200 (driver 580.159, torch 2.11+cu130, cuBLAS 13, 2026-11-23; tests/bench/h200_kernels.py):
# the rate inside a wave, start and end of waves left out, over the rate of whole large products, 790.
BF16_WAVE_OVER_LARGE = 1.063  # 840 TFLOP/s
FP16_WAVE_OVER_LARGE = 1.037  # 820 TFLOP/s
# Large products one after the other run below the highest clock: in 17 training steps (cost/power.py) products
# at φ took as long as with waves of 933·φ TFLOP/s, 4 % RMS.
HIGHEST_CLOCK = 1.11
FP32_WAVE_FRACTION = 0.776  # 52 of 67 TFLOP/s: cores without TF32, torch's default
LARGE_FLOPS_PER_S = 790.3e12  # bf16, of the H200 that attention was measured on
REFERENCE_FP32_FLOPS_PER_S = 52e12
HOPPER_CAPABILITY = 9.0


@dataclass(frozen=True, slots=True)
class Device:
    """Rates of one GPU at its highest clock as kernels see them, and how its host compares with the measured one.

    Where the power limit is not known the clock is the one that its large products were measured at.
    """

    bf16_flops_per_s: float
    fp16_flops_per_s: float
    fp32_flops_per_s: float
    bytes_per_s: float
    attention_scale: float  # seconds of bf16 attention over the measured H200's
    power_flops_per_s: float | None
    highest_clock: float  # over that of large products alone
    has_cudnn_attention: bool
    dispatch_scale: float
    compiled_dispatch_scale: float

    def flops_per_s(self, dtype: DType) -> float:
        """FLOP/s inside a wave of a product in that type."""
        if dtype is DType.BF16:
            return self.bf16_flops_per_s
        return self.fp16_flops_per_s if dtype is DType.FP16 else self.fp32_flops_per_s


def device_of(hardware: Hardware) -> Device:
    """The rates of a profile's GPU; a type without units of its own runs at the fp32 rate."""
    gpu, rates = hardware.gpu, hardware.rates
    fp32 = gpu.fp32_flops_per_s * FP32_WAVE_FRACTION
    large_bf16 = (gpu.bf16_flops_per_s or 0.0) * rates.matmul_fraction
    large_fp16 = (gpu.fp16_flops_per_s or 0.0) * rates.matmul_fraction
    clock = HIGHEST_CLOCK if gpu.power_flops_per_s else 1.0
    return Device(
        bf16_flops_per_s=max(fp32, large_bf16 * BF16_WAVE_OVER_LARGE * clock),
        fp16_flops_per_s=max(fp32, large_fp16 * FP16_WAVE_OVER_LARGE * clock),
        attention_scale=LARGE_FLOPS_PER_S / max(large_bf16, large_fp16, fp32),
        power_flops_per_s=gpu.power_flops_per_s,
        highest_clock=clock,
        fp32_flops_per_s=fp32,
        bytes_per_s=gpu.hbm_bytes_per_s * rates.hbm_fraction,
        has_cudnn_attention=(gpu.compute_capability or 0.0) >= HOPPER_CAPABILITY,
        dispatch_scale=rates.dispatch_scale,
        compiled_dispatch_scale=rates.compiled_dispatch_scale,
    )
