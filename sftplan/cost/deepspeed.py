"""What DeepSpeed's engine costs beyond the kernels of a step: Python per weight, passes over the gradients.

Measured on an H200 with 16 cores (2026-11, DeepSpeed 0.19.8, torch 2.11; bf16-master, one rank), as the
differences between phases of gpt2-large (435 weights, 774 M) and gpt2-xl (580 weights, 1,558 M).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Offload

if TYPE_CHECKING:
    from sftplan.facts.strategy import Strategy

# Checking each gradient for overflow and its norm in fp64, then one flat update: 0.1025 s of gpt2-large
# and 0.1672 s of gpt2-xl are two equations for these two.
UPDATE_WEIGHT_S = 1.3e-4
UPDATE_BYTES_PER_PARAMETER = 255
STAGE3_UPDATE_WEIGHT_S = 1.1e-4  # 0.062 s of gpt2-large, of which 0.014 s move bytes
# Hooks of every module, forward (0.33 ms) and backward (0.40 ms) per weight: gpt2-large alone.
STAGE3_PASS_WEIGHT_S = 7.3e-4
# Norm, fp32 copy and pinned copy of each gradient as it leaves: 0.52 and 0.53 ms of the two models.
OFFLOAD_PASS_WEIGHT_S = 5.2e-4
STAGE3_OFFLOAD_PASS_WEIGHT_S = 2.3e-4  # gpt2-large alone


def passes_s(strategy: Strategy, num_weights: float) -> float:
    """Seconds that forward and backward passes take longer.

    >>> from sftplan.facts.strategy import Strategy
    >>> round(passes_s(Strategy(zero=2, offload=Offload.OPTIMIZER), 435), 3)
    0.226
    """
    offloads = strategy.offload is not Offload.NONE
    each = 0.0
    if strategy.zero == 3:
        each = STAGE3_PASS_WEIGHT_S + offloads * STAGE3_OFFLOAD_PASS_WEIGHT_S
    elif offloads:
        each = OFFLOAD_PASS_WEIGHT_S
    return strategy.accumulation * num_weights * each


def update_s(
    strategy: Strategy, num_weights: float, parameters: float, bytes_per_s: float
) -> float:
    """Seconds of the optimizer's phase on the GPU; `parameters` are one rank's.

    >>> from sftplan.facts.strategy import Strategy
    >>> round(update_s(Strategy(zero=1), 435, 774_030_080, 4.4e12), 3)
    0.101
    """
    if strategy.zero == 0 or strategy.offload is not Offload.NONE:
        return 0.0
    if strategy.zero == 3:
        return num_weights * STAGE3_UPDATE_WEIGHT_S
    return num_weights * UPDATE_WEIGHT_S + parameters * UPDATE_BYTES_PER_PARAMETER / bytes_per_s
