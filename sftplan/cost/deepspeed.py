"""What DeepSpeed's engine costs beyond the kernels of a step: Python per weight, passes over the gradients.

Measured on an H200 with 16 cores (2026-11, DeepSpeed 0.19.8, torch 2.11; bf16-master, one rank), as the
differences between phases of gpt2-large (435 weights, 774 M) and gpt2-xl (580 weights, 1,558 M).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sftplan.cost.dispatch import MICRO, OTHER_US
from sftplan.facts.strategy import Offload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.cost.clocks import Segment
    from sftplan.facts.strategy import Strategy

# Of each parameter that a rank updates, beside AdamW's own: read for its largest and its smallest (4), in fp64 for
# its norm (18), laid flat (4), in fp32 (6), clipped (8), the new weight in its type (6); stage_1_and_2.py, step.
UPDATE_BYTES_PER_PARAMETER = 46
# What is left of the optimizer's phase per weight: median of gpt2-large (stage 1; stage 2 on one and on two H200)
# and gpt2-xl (stage 1), 1.3e-4 to 2.1e-4.
UPDATE_WEIGHT_S = 1.97e-4
# The hook that takes each gradient into a bucket under stage 2 (reduce_independent_p_g_buckets_and_remove_grads):
# gpt2-large's backward pass takes 0.0985 s on one rank, 0.0851 and 0.0848 under stage 1 and without DeepSpeed.
BUCKET_WEIGHT_S = 3.1e-5
STAGE3_UPDATE_WEIGHT_S = 1.1e-4  # 0.062 s of gpt2-large, of which 0.014 s move bytes
OFFLOAD_UPDATE_WEIGHT_S = 2 * OTHER_US * MICRO  # its norm read off the GPU, its view of the weights
# Hooks before and after each module, which gather and release (parameter_offload.py): 443 modules of
# gpt2-large, whose passes at stage 3 take 0.232 and 0.284 s, with parameters offloaded 0.194 and 0.273.
HOOK_FORWARD_S = 4.3e-4
HOOK_BACKWARD_S = 5.2e-4
# Of each gradient under stage 3: copied to the host and back, its norm in fp64, cast, copied again
# (stage3.py, partition_grads).
STAGE3_LEAVING_OPERATIONS = 8
# Norm, check and cast of each gradient as it leaves under stages 1 and 2: gpt2-large, 0.306 s of backward
# pass, 0.081 of them kernels and 0.056 copies.
OFFLOAD_PASS_WEIGHT_S = 3.9e-4


def hooked(segments: Sequence[Segment], strategy: Strategy, scale: float) -> Sequence[Segment]:
    """A pass with the host's time for stage 3's hooks, spread as it was before.

    M·forward going forward, M·backward going back, and there forward again for what is computed again.

    >>> from sftplan.cost.clocks import Segment
    >>> from sftplan.facts.strategy import Strategy
    >>> passes = [Segment("forward", 36, 6e-4, 0, 0, 9, 0, 12), Segment("backward", 36, 8e-4, 0, 0, 9, 12)]
    >>> [round(36 * s.host_s, 3) for s in hooked(passes, Strategy(zero=3), 1.0)]
    [0.207, 0.253]
    """
    if strategy.zero < 3:
        return segments
    weights = sum(s.tensors * s.times for s in segments)
    called = {
        phase: sum(s.modules * s.times for s in segments if s.phase == phase)
        for phase in ("forward", "backward")
    }
    modules = max(called["forward"], weights)  # of compiled blocks the tape knows no modules
    leaving = STAGE3_LEAVING_OPERATIONS * OTHER_US * MICRO * (strategy.offload is not Offload.NONE)
    more = {
        "forward": modules * HOOK_FORWARD_S,
        "backward": modules * HOOK_BACKWARD_S
        + called["backward"] * HOOK_FORWARD_S
        + weights * leaving,
    }
    hosts = {
        phase: sum(s.host_s * s.times for s in segments if s.phase == phase) for phase in called
    }
    return [
        replace(s, host_s=s.host_s * (1 + scale * more[s.phase] / hosts[s.phase])) for s in segments
    ]


def passes_s(strategy: Strategy, num_weights: float) -> float:
    """Seconds that backward passes take longer under stages 1 and 2, copies not included.

    Each gradient that leaves is asked for what is not finite, so the host waits for the one before
    to be on it: nothing runs beside (stage_1_and_2.py, update_offload_overflow_tracker).

    >>> from sftplan.facts.strategy import Strategy
    >>> [round(passes_s(Strategy(zero=2, offload=x), 435), 4) for x in (Offload.OPTIMIZER, Offload.NONE)]
    [0.1696, 0.0135]
    """
    if strategy.zero == 3:
        return 0.0
    if strategy.offload is not Offload.NONE:
        return strategy.accumulation * num_weights * OFFLOAD_PASS_WEIGHT_S
    return strategy.accumulation * num_weights * BUCKET_WEIGHT_S * (strategy.zero == 2)


def update_s(
    strategy: Strategy, num_weights: float, parameters: float, bytes_per_s: float, *, ranks: int = 1
) -> float:
    """Seconds of the optimizer's phase on the GPU, and per weight; `parameters` are one rank's.

    Under stages 1 and 2 a rank goes through the weights that it updates, under stage 3 through its share of each.

    >>> from sftplan.facts.strategy import Strategy
    >>> round(update_s(Strategy(zero=1), 435, 774_030_080, 4.4e12), 3)
    0.094
    >>> round(update_s(Strategy(zero=1), 435, 387_015_040, 4.4e12, ranks=2), 3)
    0.047
    """
    if strategy.zero == 3:
        return num_weights * STAGE3_UPDATE_WEIGHT_S
    if strategy.offload is not Offload.NONE:
        return num_weights * OFFLOAD_UPDATE_WEIGHT_S
    if strategy.zero == 0:
        return 0.0
    moved_s = parameters * UPDATE_BYTES_PER_PARAMETER / bytes_per_s
    return num_weights / ranks * UPDATE_WEIGHT_S + moved_s
