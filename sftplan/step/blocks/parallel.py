"""Blocks whose attention and MLP work side by side: GPT-NeoX (Pythia) and Phi."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.blocks.context import activation, attention, rotate_both
from sftplan.step.ops.matmul import linear
from sftplan.step.ops.norm import layer_norm
from sftplan.step.ops.pointwise import add, dropout
from sftplan.step.ops.shape import cat_last, heads_of, merge_heads, slice_last, split

if TYPE_CHECKING:
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor


def _norm(tape: Tape, w: LayerWeights, name: str, x: Tensor) -> Tensor:
    return layer_norm(tape, x, w[f"{name}.weight"], w[f"{name}.bias"])


def _project(tape: Tape, w: LayerWeights, name: str, x: Tensor) -> Tensor:
    return linear(tape, x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def neox_block(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """x + attention(norm₁ x) + mlp(norm₂ x); one after the other where the model says so.

    What a norm gives is held while it is called with, as a module's arguments are.
    """
    probability = context.model.residual_dropout
    normed = _norm(tape, w, "input_layernorm", x)
    attended = _neox_attention(tape, context, number, w, normed)
    del normed
    attended = dropout(tape, attended, probability)
    if not context.model.parallel_residual:
        attended = add(tape, attended, x)
        normed = _norm(tape, w, "post_attention_layernorm", attended)
        fed = _neox_mlp(tape, context, w, normed)
        del normed
        return add(tape, dropout(tape, fed, probability), attended)
    normed = _norm(tape, w, "post_attention_layernorm", x)
    fed = _neox_mlp(tape, context, w, normed)
    del normed
    fed = dropout(tape, fed, probability)
    x = add(tape, add(tape, fed, attended), x)
    return x  # noqa: RET504 - the name's lifetime is the modelling code's


def _neox_attention(
    tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor
) -> Tensor:
    model = context.model
    qkv = heads_of(tape, _project(tape, w, "attention.query_key_value", x), model.num_heads)
    q, k, v = split(tape, qkv, *[model.head_dim] * 3)
    assert context.tables is not None
    q, k = rotate_both(tape, q, k, context.tables)
    out = attention(tape, context, number, q, k, v)
    out = merge_heads(tape, out)
    out = _project(tape, w, "attention.dense", out)
    return out  # noqa: RET504


def _neox_mlp(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    x = _project(tape, w, "mlp.dense_h_to_4h", x)
    x = activation(tape, context, x)
    x = _project(tape, w, "mlp.dense_4h_to_h", x)
    return x  # noqa: RET504


def phi_block(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """x + attention(norm x) + mlp(norm x)."""
    model = context.model
    residual = x
    x = _norm(tape, w, "input_layernorm", x)
    attended = _phi_attention(tape, context, number, w, x)
    attended = dropout(tape, attended, model.residual_dropout)
    fed = dropout(tape, _phi_mlp(tape, context, w, x), model.residual_dropout)
    x = add(tape, add(tape, attended, fed), residual)
    return x  # noqa: RET504


def _phi_attention(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """Parts of queries and keys have names, so that they live until the end."""
    model = context.model
    q = heads_of(tape, _project(tape, w, "self_attn.q_proj", x), model.num_heads)
    k = heads_of(tape, _project(tape, w, "self_attn.k_proj", x), model.num_kv_heads)
    v = heads_of(tape, _project(tape, w, "self_attn.v_proj", x), model.num_kv_heads)
    assert context.tables is not None
    size = context.tables[0].shape[-1]
    turned_q, passed_q = slice_last(tape, q, size), slice_last(tape, q, model.head_dim - size)
    turned_k, passed_k = slice_last(tape, k, size), slice_last(tape, k, model.head_dim - size)
    turned_q, turned_k = rotate_both(tape, turned_q, turned_k, context.tables)
    q = cat_last(tape, turned_q, passed_q)
    k = cat_last(tape, turned_k, passed_k)
    out = attention(tape, context, number, q, k, v)
    out = merge_heads(tape, out)
    out = _project(tape, w, "self_attn.dense", out)
    return out  # noqa: RET504


def _phi_mlp(tape: Tape, context: Context, w: LayerWeights, x: Tensor) -> Tensor:
    x = _project(tape, w, "mlp.fc1", x)
    x = activation(tape, context, x)
    x = _project(tape, w, "mlp.fc2", x)
    return x  # noqa: RET504
