"""OPT (transformers/models/opt/modeling_opt.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.blocks.context import activation, attention
from sftplan.step.ops.matmul import linear
from sftplan.step.ops.norm import layer_norm
from sftplan.step.ops.pointwise import add, dropout, scale
from sftplan.step.ops.shape import heads_of, merge_heads, view

if TYPE_CHECKING:
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor


def opt_block(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """x + attention(norm x), then + mlp(norm ·); OPT-350m norms after the additions instead."""
    model, hashed = context.model, context.strategy.compile
    residual = x
    if not model.post_norm:
        x = _norm(tape, w, "self_attn_layer_norm", x)
    x = _attention(tape, context, number, w, x)
    x = dropout(tape, x, model.residual_dropout, hashed=hashed)
    x = add(tape, residual, x)
    if model.post_norm:
        x = _norm(tape, w, "self_attn_layer_norm", x)
    shape = x.shape
    x = view(tape, x, shape[0] * shape[1], shape[2])
    residual = x
    if not model.post_norm:
        x = _norm(tape, w, "final_layer_norm", x)
    x = linear(tape, x, w["fc1.weight"], w.get("fc1.bias"))
    x = activation(tape, context, x)
    x = linear(tape, x, w["fc2.weight"], w.get("fc2.bias"))
    x = dropout(tape, x, model.residual_dropout, hashed=hashed)
    x = view(tape, add(tape, residual, x), *shape)
    if model.post_norm:
        x = _norm(tape, w, "final_layer_norm", x)
    return x


def _norm(tape: Tape, w: LayerWeights, name: str, x: Tensor) -> Tensor:
    return layer_norm(tape, x, w[f"{name}.weight"], w[f"{name}.bias"])


def _attention(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    heads = context.model.num_heads

    def project(name: str, y: Tensor) -> Tensor:
        return linear(tape, y, w[f"self_attn.{name}.weight"], w.get(f"self_attn.{name}.bias"))

    q = scale(tape, project("q_proj", x))
    q = heads_of(tape, q, heads)
    k = project("k_proj", x)
    v = project("v_proj", x)
    k = heads_of(tape, k, heads)
    v = heads_of(tape, v, heads)
    out = attention(tape, context, number, q, k, v)
    out = merge_heads(tape, out)
    out = project("out_proj", out)
    return out  # noqa: RET504
