"""GPT-2 (transformers/models/gpt2/modeling_gpt2.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.blocks.context import activation, attention
from sftplan.step.ops.matmul import linear
from sftplan.step.ops.norm import layer_norm
from sftplan.step.ops.pointwise import add, dropout
from sftplan.step.ops.shape import heads_of, merge_heads, split

if TYPE_CHECKING:
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor


def gpt2_block(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """x + attention(ln_1 x), then + mlp(ln_2 ·)."""
    residual = x
    x = layer_norm(tape, x, w["ln_1.weight"], w["ln_1.bias"])
    attended = _attention(tape, context, number, w, x)
    x = add(tape, attended, residual)
    residual = x
    x = layer_norm(tape, x, w["ln_2.weight"], w["ln_2.bias"])
    fed = _mlp(tape, context, w, x)
    x = add(tape, residual, fed)
    return x  # noqa: RET504 - the name's lifetime is the modelling code's


def _attention(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    model = context.model
    sizes = [model.hidden_size] * 3
    q, k, v = split(tape, _conv1d(tape, x, w, "attn.c_attn"), *sizes)
    k = heads_of(tape, k, model.num_heads)
    v = heads_of(tape, v, model.num_heads)
    q = heads_of(tape, q, model.num_heads)
    out = attention(tape, context, number, q, k, v)
    out = merge_heads(tape, out)
    out = _conv1d(tape, out, w, "attn.c_proj")
    out = dropout(tape, out, model.residual_dropout)
    return out  # noqa: RET504


def _mlp(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    x = _conv1d(tape, x, w, "mlp.c_fc")
    x = activation(tape, context, x)
    x = _conv1d(tape, x, w, "mlp.c_proj")
    x = dropout(tape, x, context.model.residual_dropout)
    return x  # noqa: RET504


def _conv1d(tape: Tape, x: Tensor, w: LayerWeights, name: str) -> Tensor:
    return linear(tape, x, w[f"{name}.weight"], w[f"{name}.bias"], bias_last=True)
