"""Readers of mixture-of-experts configurations; defaults are transformers 5.23's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.dimensions import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIZE,
    Shape,
    read_attention_windows,
    read_llama_like,
    read_window,
)
from sftplan.facts.model import Experts, Family

if TYPE_CHECKING:
    from sftplan.facts.fields import Fields


def _experts_per_token(fields: Fields, num_experts: int, default: int) -> int:
    key = "num_experts_per_tok"
    chosen = fields.integer(key, maximum=MAX_EXPERTS, default=default)
    if chosen > num_experts:
        fields.fail(key, f"is {chosen}, but there are {num_experts} experts")
    return chosen


def read_mixtral(fields: Fields) -> Shape:
    """Every layer sparse, weights of the chosen experts normalized."""
    shape = read_llama_like(fields, kv_heads=8)
    number = fields.integer("num_local_experts", "num_experts", maximum=MAX_EXPERTS, default=8)
    experts = Experts(
        num_experts=number,
        experts_per_token=_experts_per_token(fields, number, 2),
        intermediate_size=shape["intermediate_size"],
        norm_topk=True,
    )
    return shape | {
        "family": Family.MOE,
        "experts": experts,
        "sliding_window": read_window(fields, None),
    }


def _dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers with a plain MLP: those listed, and all but every `decoder_sparse_step`-th."""
    step = fields.integer("decoder_sparse_step", maximum=MAX_LAYERS, default=1)
    listed = fields.items("mlp_only_layers") or []
    for index in listed:
        if isinstance(index, bool) or not isinstance(index, int):
            fields.fail("mlp_only_layers", "must hold layer numbers")
    chosen = set(listed)
    return tuple(i for i in range(num_layers) if i in chosen or (i + 1) % step)


def read_qwen2_moe(fields: Fields) -> Shape:
    """A shared expert behind a gate of its own beside the routed ones."""
    shape = read_llama_like(fields, kv_heads=16)
    number = fields.integer("num_experts", "num_local_experts", maximum=MAX_EXPERTS, default=60)
    experts = Experts(
        num_experts=number,
        experts_per_token=_experts_per_token(fields, number, 4),
        intermediate_size=fields.integer("moe_intermediate_size", maximum=MAX_SIZE, default=1408),
        shared_intermediate_size=fields.integer(
            "shared_expert_intermediate_size", maximum=MAX_SIZE, default=5632
        ),
        shared_gate=True,
        norm_topk=fields.flag("norm_topk_prob", default=False),
    )
    windows: Shape = {}
    if fields.flag("use_sliding_window", default=False):
        last = fields.integer("max_window_layers", maximum=MAX_LAYERS, minimum=0, default=28)
        slides = [index < last and index % 2 == 0 for index in range(shape["num_layers"])]
        windows = read_attention_windows(fields, shape, read_window(fields, 4096), slides)
    return (
        shape
        | windows
        | {
            "family": Family.MOE,
            "qkv_bias": fields.flag("qkv_bias", default=True),
            "experts": experts,
            "dense_layers": _dense_layers(fields, shape["num_layers"]),
        }
    )


def read_qwen3_moe(fields: Fields) -> Shape:
    """Qwen3 attention and experts without a shared one."""
    shape = read_llama_like(fields, kv_heads=4)
    number = fields.integer("num_experts", "num_local_experts", maximum=MAX_EXPERTS, default=128)
    experts = Experts(
        num_experts=number,
        experts_per_token=_experts_per_token(fields, number, 8),
        intermediate_size=fields.integer("moe_intermediate_size", maximum=MAX_SIZE, default=768),
        norm_topk=fields.flag("norm_topk_prob", default=False),
    )
    bias = fields.flag("attention_bias", default=False)
    windowed = fields.flag("use_sliding_window", default=False)
    return shape | {
        "family": Family.MOE,
        "qk_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "experts": experts,
        "dense_layers": _dense_layers(fields, shape["num_layers"]),
        "sliding_window": read_window(fields, 4096) if windowed else None,
    }
