"""One reader per architecture: what its config.json says, in the terms of a model's shape.

Defaults are those of transformers 5.23's configuration classes. What fixes a model's size must be
there; only Gemma 3's published files leave it out, so its defaults count as given. A field that
changes parameters in a way that is not modelled is refused, never ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.dimensions import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIZE,
    MAX_VOCAB,
    Shape,
    equal_parts,
    read_activation,
    read_attention_windows,
    read_llama_like,
    read_rotary_fraction,
    read_window,
)
from sftplan.facts.model import Family
from sftplan.facts.sparse import read_mixtral, read_qwen2_moe, read_qwen3_moe

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.facts.fields import Fields


def _gpt2(fields: Fields) -> Shape:
    hidden = fields.integer("n_embd", "hidden_size", maximum=MAX_SIZE)
    heads = fields.integer("n_head", "num_attention_heads", maximum=MAX_HEADS)
    positions = fields.integer(
        "n_positions", "max_position_embeddings", maximum=MAX_VOCAB, default=1024
    )
    if fields.flag("add_cross_attention", default=False):
        fields.fail("add_cross_attention", "is true; only plain decoders are modelled")
    return {
        "family": Family.GPT2,
        "num_layers": fields.integer("n_layer", "num_hidden_layers", maximum=MAX_LAYERS),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("n_inner", maximum=MAX_SIZE, default=4 * hidden),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": equal_parts(fields, hidden, heads),
        "vocab_size": fields.integer("vocab_size", maximum=MAX_VOCAB),
        "max_positions": positions,
        "position_rows": positions,
        "tied_embeddings": fields.flag("tie_word_embeddings", default=True),
        "activation": read_activation(fields, "activation_function", default="gelu_new"),
        "norm": "layernorm",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "rotary_fraction": 0.0,
        "embedding_dropout": fields.fraction("embd_pdrop", default=0.1),
        "residual_dropout": fields.fraction("resid_pdrop", default=0.1),
        "attention_dropout": fields.fraction("attn_pdrop", default=0.1),
    }


def _opt(fields: Fields) -> Shape:
    hidden = fields.integer("hidden_size", maximum=MAX_SIZE)
    heads = fields.integer("num_attention_heads", maximum=MAX_HEADS)
    positions = fields.integer("max_position_embeddings", maximum=MAX_VOCAB)
    width = fields.integer("word_embed_proj_dim", maximum=MAX_SIZE, default=hidden)
    pre_norm = fields.flag("do_layer_norm_before", default=True)
    bias = fields.flag("enable_bias", default=True)
    if not fields.flag("layer_norm_elementwise_affine", default=True):
        fields.fail(
            "layer_norm_elementwise_affine", "is false; norms without weights are not modelled"
        )
    return {
        "family": Family.OPT,
        "num_layers": fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("ffn_dim", maximum=MAX_SIZE),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": equal_parts(fields, hidden, heads),
        "vocab_size": fields.integer("vocab_size", maximum=MAX_VOCAB),
        "max_positions": positions,
        "position_rows": positions + 2,  # the first two are the padding's
        "tied_embeddings": fields.flag("tie_word_embeddings", default=True),
        "embedding_size": width if width != hidden else None,
        "activation": read_activation(fields, "activation_function", default="relu"),
        "norm": "layernorm",
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "rotary_fraction": 0.0,
        "post_norm": not pre_norm,
        "final_norm": pre_norm and not fields.flag("_remove_final_layer_norm", default=False),
        "residual_dropout": fields.fraction("dropout", default=0.1),
        "attention_dropout": fields.fraction("attention_dropout"),
    }


def _neox(fields: Fields) -> Shape:
    shape = read_llama_like(fields, activation=("hidden_act", "gelu"))
    hidden, heads = shape["hidden_size"], shape["num_heads"]
    bias = fields.flag("attention_bias", default=True)
    dropout = fields.fraction("hidden_dropout")
    return shape | {
        "family": Family.NEOX,
        "num_kv_heads": heads,
        "head_dim": equal_parts(fields, hidden, heads),
        "norm": "layernorm",
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": True,
        "parallel_residual": fields.flag("use_parallel_residual", default=True),
        "rotary_fraction": read_rotary_fraction(fields, "rotary_pct", 0.25),
        "embedding_dropout": dropout,
        "residual_dropout": dropout,
    }


def _phi(fields: Fields) -> Shape:
    if fields.flag("qk_layernorm", default=False):
        fields.fail("qk_layernorm", "is true; LayerNorm over q and k is not modelled")
    return read_llama_like(fields, activation=("hidden_act", "gelu_new")) | {
        "family": Family.PHI,
        "norm": "layernorm",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "parallel_residual": True,
        "rotary_fraction": read_rotary_fraction(fields, "partial_rotary_factor", 0.5),
        "embedding_dropout": fields.fraction("embd_pdrop"),
        "residual_dropout": fields.fraction("resid_pdrop"),
    }


def _phi3(fields: Fields) -> Shape:
    shape = read_llama_like(fields) | {
        "family": Family.PHI3,
        "rotary_fraction": read_rotary_fraction(fields, "partial_rotary_factor", 1.0),
        "residual_dropout": fields.fraction("resid_pdrop"),  # embd_pdrop is read by no module
    }
    return shape | {"sliding_window": read_window(fields, None)}


def _llama(fields: Fields) -> Shape:
    shape = read_llama_like(fields)
    equal_parts(fields, shape["hidden_size"], shape["num_heads"])  # required even with a head_dim
    bias = fields.flag("attention_bias", default=False)
    return shape | {
        "family": Family.LLAMA,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", default=False),
    }


def _mistral(fields: Fields) -> Shape:
    shape = read_llama_like(fields, kv_heads=8)
    return shape | {"family": Family.LLAMA, "sliding_window": read_window(fields, 4096)}


def _qwen_windows(fields: Fields, shape: Shape) -> Shape:
    """Windows are off unless asked for, and then start at layer `max_window_layers`."""
    if not fields.flag("use_sliding_window", default=False):
        return {}
    first = fields.integer("max_window_layers", maximum=MAX_LAYERS, minimum=0, default=28)
    slides = [index >= first for index in range(shape["num_layers"])]
    return read_attention_windows(fields, shape, read_window(fields, 4096), slides)


def _qwen2(fields: Fields) -> Shape:
    shape = read_llama_like(fields, kv_heads=32)
    return shape | _qwen_windows(fields, shape) | {"family": Family.LLAMA, "qkv_bias": True}


def _qwen3(fields: Fields) -> Shape:
    shape = read_llama_like(fields, kv_heads=32, head_dim=128)
    bias = fields.flag("attention_bias", default=False)
    return (
        shape
        | _qwen_windows(fields, shape)
        | {"family": Family.LLAMA, "qk_norm": True, "qkv_bias": bias, "output_bias": bias}
    )


def _gemma(fields: Fields) -> Shape:
    shape = read_llama_like(
        fields,
        tied=True,
        kv_heads=16,
        head_dim=256,
        activation=("hidden_act", "gelu_pytorch_tanh"),
    )
    if (
        shape["activation"] == "gelu"
    ):  # the published files say so and mean this, as transformers has it
        shape["activation"] = "gelu_pytorch_tanh"
    return shape | _gemma_common(fields)


def _gemma_common(fields: Fields) -> Shape:
    bias = fields.flag("attention_bias", default=False)
    return {
        "family": Family.GEMMA,
        "qkv_bias": bias,
        "output_bias": bias,
        "embedding_scale": True,
    }


def _later_gemma(fields: Fields, defaults: dict[str, int], pattern: int) -> Shape:
    """Gemma 2 and 3: every `pattern`-th layer looks at everything, the others at a window."""
    shape = read_llama_like(
        fields,
        tied=True,
        kv_heads=4,
        head_dim=256,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        defaults=defaults,
    )
    equal_parts(fields, shape["hidden_size"], shape["num_heads"])
    slides = [(index + 1) % pattern != 0 for index in range(shape["num_layers"])]
    windows = read_attention_windows(fields, shape, read_window(fields, 4096), slides)
    return shape | windows | _gemma_common(fields) | {"sandwich_norms": True}


def _gemma2(fields: Fields) -> Shape:
    return _later_gemma(fields, {}, 2) | {
        "attention_softcap": fields.nullable_number("attn_logit_softcapping", 50.0),
        "logit_softcap": fields.nullable_number("final_logit_softcapping", 30.0),
    }


_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}


def _gemma3(fields: Fields) -> Shape:
    pattern = fields.integer("sliding_window_pattern", maximum=MAX_LAYERS, default=6)
    return _later_gemma(fields, _GEMMA3_DEFAULTS, pattern) | {
        "qk_norm": True,
        "attention_softcap": fields.nullable_number("attn_logit_softcapping"),
        "logit_softcap": fields.nullable_number("final_logit_softcapping"),
    }


READERS: dict[str, Callable[[Fields], Shape]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt_neox": _neox,
    "opt": _opt,
    "mixtral": read_mixtral,
    "qwen2_moe": read_qwen2_moe,
    "qwen3_moe": read_qwen3_moe,
}
