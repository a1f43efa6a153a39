"""Normalisations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.ops.pointwise import mean_last, mul, power, rsqrt, shift
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape


def layer_norm(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm in one kernel, in fp32 under autocast; keeps its input, mean and 1/σ."""
    x, weight, bias = tape.high(x), tape.high(weight), tape.high(bias)
    node = tape.node("layer_norm", (x, weight, bias), _layer_norm_backward, (x, weight, bias))
    out = tape.empty(x.shape, x.dtype)
    statistics = [tape.empty((*x.shape[:-1], 1), DType.FP32) for _ in ("mean", "rstd")]
    tape.pointwise("layer_norm", [x, out])
    for statistic in statistics:
        tape.save(node, statistic)
    out.node = node
    return out


def _layer_norm_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    (gradient,), (x, weight, bias, _, _) = gradients, saved
    assert gradient is not None
    out = tape.empty(x.shape, x.dtype)
    weight_gradient = tape.empty(weight.shape, weight.dtype)
    bias_gradient = tape.empty(bias.shape, bias.dtype)
    tape.pointwise("layer_norm", [gradient, x, out])
    tape.pointwise("layer_norm_weight", [gradient, x, weight_gradient])
    return [out, weight_gradient, bias_gradient]


def rms_norm(tape: Tape, x: Tensor, weight: Tensor, *, one_plus: bool = False) -> Tensor:
    """RMSNorm as transformers writes it, op by op: x·1/√(mean x² + ε) in fp32, times the weight.

    `one_plus` is Gemma's: (1 + weight) in fp32, and only then back to the input's type.
    """
    dtype = x.dtype
    x = tape.cast(x, DType.FP32)
    if one_plus:
        x = mul(tape, x, rsqrt(tape, shift(tape, mean_last(tape, power(tape, x)))))
        x = mul(tape, x, shift(tape, tape.cast(weight, DType.FP32)))
        return tape.cast(x, dtype)
    variance = mean_last(tape, power(tape, x))
    x = mul(tape, x, rsqrt(tape, shift(tape, variance)))
    return mul(tape, weight, tape.cast(x, dtype))
