"""Llama and its kin: Mistral, Qwen, Gemma, Phi-3, and mixtures of experts (transformers/models/llama ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.step.blocks.context import activation, attention, rotate_both
from sftplan.step.blocks.experts import experts_mlp
from sftplan.step.ops.matmul import linear
from sftplan.step.ops.norm import layer_norm, rms_norm
from sftplan.step.ops.pointwise import add, dropout, mul
from sftplan.step.ops.shape import heads_of, merge_heads, slice_last, split, transpose, view

if TYPE_CHECKING:
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor


def norm(tape: Tape, context: Context, w: LayerWeights, name: str, x: Tensor) -> Tensor:
    """The model's normalisation with the weights of that name."""
    if context.model.norm == "layernorm":
        return layer_norm(tape, x, w[f"{name}.weight"], w[f"{name}.bias"])
    one_plus = context.model.family is Family.GEMMA
    return rms_norm(tape, x, w[f"{name}.weight"], one_plus=one_plus)


def llama_block(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """x + attention(norm x), then + mlp(norm ·); with sandwich norms each branch is normed again."""
    model = context.model
    residual = x
    x = norm(tape, context, w, "input_layernorm", x)
    x = _attention(tape, context, number, w, x)
    if model.sandwich_norms:
        x = norm(tape, context, w, "post_attention_layernorm", x)
    x = add(tape, residual, dropout(tape, x, model.residual_dropout))
    residual = x
    before_mlp = "pre_feedforward_layernorm" if model.sandwich_norms else "post_attention_layernorm"
    x = norm(tape, context, w, before_mlp, x)
    x = _mlp(tape, context, w, x)
    if model.sandwich_norms:
        x = norm(tape, context, w, "post_feedforward_layernorm", x)
    x = add(tape, residual, dropout(tape, x, model.residual_dropout))
    return x  # noqa: RET504 - the name's lifetime is the modelling code's


def _projections(
    tape: Tape, context: Context, w: LayerWeights, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    model = context.model
    if model.family is Family.PHI3:
        qkv = linear(tape, x, w["self_attn.qkv_proj.weight"])
        q = slice_last(tape, qkv, model.query_size)
        k = slice_last(tape, qkv, model.kv_size)
        v = slice_last(tape, qkv, model.kv_size)
        return (
            heads_of(tape, q, model.num_heads),
            heads_of(tape, k, model.num_kv_heads),
            heads_of(tape, v, model.num_kv_heads),
        )
    parts = []
    for name, heads in (
        ("q", model.num_heads),
        ("k", model.num_kv_heads),
        ("v", model.num_kv_heads),
    ):
        bias = w.get(f"self_attn.{name}_proj.bias")
        part = linear(tape, x, w[f"self_attn.{name}_proj.weight"], bias)
        if model.qk_norm and name != "v":
            part = view(tape, part, *part.shape[:2], heads, model.head_dim)
            part = norm(tape, context, w, f"self_attn.{name}_norm", part)
            part = transpose(tape, part)
        else:
            part = heads_of(tape, part, heads)
        parts.append(part)
        del part
    q, k, v = parts
    return q, k, v


def _attention(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    q, k, v = _projections(tape, context, w, x)
    assert context.tables is not None
    q, k = rotate_both(tape, q, k, context.tables)
    out = attention(tape, context, number, q, k, v)
    out = merge_heads(tape, out)
    out = linear(tape, out, w["self_attn.o_proj.weight"], w.get("self_attn.o_proj.bias"))
    return out  # noqa: RET504


def _mlp(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    if "mlp.experts.gate_up_proj" in w:
        return experts_mlp(tape, context, w, x)
    if context.model.family is Family.PHI3:
        gate_up = linear(tape, x, w["mlp.gate_up_proj.weight"])
        gate, up = split(tape, gate_up, *[context.model.intermediate_size] * 2)
        up = mul(tape, up, activation(tape, context, gate))
        return linear(tape, up, w["mlp.down_proj.weight"])
    return gated_mlp(tape, context, w, "mlp", x)


def gated_mlp(tape: Tape, context: Context, w: LayerWeights, name: str, x: Tensor) -> Tensor:
    """down(act(gate x)·up x)."""

    def project(which: str, y: Tensor) -> Tensor:
        return linear(tape, y, w[f"{name}.{which}_proj.weight"], w.get(f"{name}.{which}_proj.bias"))

    return project(
        "down", mul(tape, activation(tape, context, project("gate", x)), project("up", x))
    )
