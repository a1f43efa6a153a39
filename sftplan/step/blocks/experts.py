"""Mixture-of-experts MLP: tokens sorted by expert, grouped products (transformers/integrations/moe.py).

Every expert is taken to get the same number of tokens; the sizes do not depend on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.blocks.context import activation
from sftplan.step.ops.matmul import grouped_linear, linear
from sftplan.step.ops.pointwise import add, mul, sigmoid, softmax, sum_groups
from sftplan.step.ops.shape import gather_rows, split, view
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor


def experts_mlp(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    """Each token through its experts, weighted by the router, plus the shared expert if there is one."""
    experts = context.model.experts
    assert experts is not None
    shape = x.shape
    x = view(tape, x, shape[0] * shape[1], shape[2])
    weights = _route(tape, context, w, x)
    out = _experts(tape, context, w, x, weights)
    if experts.shared_intermediate_size:
        out = add(tape, out, _shared(tape, context, w, x))
    return view(tape, out, *shape)


def _route(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    """Softmax over the experts in fp32; the chosen ones' share of each token, (S, 1)."""
    experts = context.model.experts
    assert experts is not None
    scores = softmax(tape, tape.cast(linear(tape, x, w["mlp.gate.weight"]), DType.FP32))
    return gather_rows(tape, view(tape, scores, scores.numel, 1), len_pairs(context, x))


def len_pairs(context: Context, x: Tensor) -> int:
    """Pairs of a token and one of its experts."""
    assert context.model.experts is not None
    return x.shape[0] * context.model.experts.experts_per_token


def _experts(tape: Tape, context: Context, w: LayerWeights, x: Tensor, weights: Tensor) -> Tensor:
    experts = context.model.experts
    assert experts is not None
    rows = gather_rows(tape, x, len_pairs(context, x))
    up = grouped_linear(tape, rows, w["mlp.experts.gate_up_proj"], 2 * experts.intermediate_size)
    gate, up = split(tape, up, *[experts.intermediate_size] * 2)
    out = mul(tape, activation(tape, context, gate), up)
    out = grouped_linear(tape, out, w["mlp.experts.down_proj"], context.model.hidden_size)
    weighted = mul(tape, out, weights)
    back = tape.cast(gather_rows(tape, weighted, weighted.shape[0]), x.dtype)
    return sum_groups(tape, back, experts.experts_per_token)


def _shared(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    gate = activation(tape, context, linear(tape, x, w["mlp.shared_expert.gate_proj.weight"]))
    out = mul(tape, gate, linear(tape, x, w["mlp.shared_expert.up_proj.weight"]))
    out = linear(tape, out, w["mlp.shared_expert.down_proj.weight"])
    if "mlp.shared_expert_gate.weight" in w:
        share = sigmoid(tape, linear(tape, x, w["mlp.shared_expert_gate.weight"]))
        out = mul(tape, share, out)
    return out
