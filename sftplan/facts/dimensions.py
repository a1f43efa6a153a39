"""Sizes that the configurations of several families spell alike, each checked for its range.

Keyword arguments named after a field are the family's default where the key is absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftplan.facts.fields import show_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.facts.fields import Fields

MAX_LAYERS = 4096
MAX_HEADS = 2**16
MAX_SIZE = 2**24  # of a vector: hidden, intermediate, head
MAX_VOCAB = 2**30
MAX_POSITIONS = 2**40
MAX_EXPERTS = 2**16

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu",
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_new", "gelu_fast": "gelu_fast",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}  # fmt: skip

Shape = dict[str, Any]


def read_activation(fields: Fields, *keys: str, default: str) -> str:
    """The MLP's activation under one name per function."""
    word = fields.word(*keys, default=default)
    if word not in _ACTIVATIONS:
        key, _ = fields.find(*keys)
        known = ", ".join(_ACTIVATIONS)
        fields.fail(
            key, f"is {show_value(word)}; this activation is not modelled", f"known: {known}"
        )
    return _ACTIVATIONS[word]


def read_kv_heads(fields: Fields, num_heads: int, missing: int | None) -> int:
    """Heads of k and v; null means as many as of q, an absent key the family's default."""
    key = "num_key_value_heads"
    found = fields.nullable_integer(key, maximum=MAX_HEADS, missing=missing)
    kv_heads = num_heads if found is None else found
    if num_heads % kv_heads:
        fields.fail(key, f"is {kv_heads}, which does not divide the {num_heads} attention heads")
    return kv_heads


def read_head_dim(fields: Fields, hidden: int, num_heads: int, missing: int | None) -> int:
    """An explicit head_dim; without one, equal parts of the hidden size."""
    found = fields.nullable_integer("head_dim", maximum=MAX_SIZE, missing=missing)
    if found is None:
        return equal_parts(fields, hidden, num_heads)
    return found


def equal_parts(fields: Fields, hidden: int, num_heads: int) -> int:
    """Size of a head where heads share out the hidden size, which must come out even."""
    if hidden % num_heads:
        key, _ = fields.find("num_attention_heads", "n_head")
        fields.fail(key, f"is {num_heads}, which does not divide the hidden size {hidden}")
    return hidden // num_heads


def read_llama_like(
    fields: Fields,
    *,
    tied: bool = False,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    defaults: Mapping[str, int] | None = None,
) -> Shape:
    """What Llama and all that descends from it share; the arguments are the family's defaults."""

    def size(key: str, maximum: int) -> int:
        return fields.integer(key, maximum=maximum, default=(defaults or {}).get(key))

    hidden, heads = size("hidden_size", MAX_SIZE), size("num_attention_heads", MAX_HEADS)
    dim = read_head_dim(fields, hidden, heads, head_dim)
    if dim % 2:
        fields.fail("head_dim", f"is {dim}; rotary positions need an even one")
    key, function = activation
    return {
        "num_layers": size("num_hidden_layers", MAX_LAYERS),
        "hidden_size": hidden,
        "intermediate_size": size("intermediate_size", MAX_SIZE),
        "num_heads": heads,
        "num_kv_heads": read_kv_heads(fields, heads, kv_heads),
        "head_dim": dim,
        "vocab_size": size("vocab_size", MAX_VOCAB),
        "max_positions": size("max_position_embeddings", MAX_POSITIONS),
        "tied_embeddings": fields.flag("tie_word_embeddings", default=tied),
        "activation": read_activation(fields, key, default=function),
        "attention_dropout": fields.fraction("attention_dropout"),
    }


def read_rotary_fraction(fields: Fields, key: str, default: float) -> float:
    """Share of each head that is rotated: from rope_parameters (transformers 5) or `key`."""
    rope = fields.inner("rope_parameters")
    old = fields.fraction(key, default=default)
    share = rope.fraction("partial_rotary_factor", default=old) if rope else old
    if share == 0:
        fields.fail(key, "is 0; some of each head must be rotated")
    return share


def read_attention_windows(
    fields: Fields, shape: Shape, window: int | None, pattern: Sequence[bool]
) -> Shape:
    """Window and kinds from `layer_types`, else from `pattern` (true: sliding)."""
    listed = fields.items("layer_types")
    if listed is not None:
        known = {"sliding_attention": True, "full_attention": False}
        for kind in listed:
            if not isinstance(kind, str) or kind not in known:
                problem = f"holds {show_value(kind)}; known are {', '.join(known)}"
                fields.fail("layer_types", problem)
        if len(listed) != shape["num_layers"]:
            problem = f"names {len(listed)} layers of {shape['num_layers']}"
            fields.fail("layer_types", problem)
        pattern = [known[str(kind)] for kind in listed]
    if window is None or not any(pattern):
        return {}
    if all(pattern):
        return {"sliding_window": window}
    kinds = tuple("sliding" if sliding else "full" for sliding in pattern)
    return {"sliding_window": window, "layer_kinds": kinds}


def read_window(fields: Fields, missing: int | None) -> int | None:
    """The sliding window in tokens; null means none, an absent key the family's default."""
    return fields.nullable_integer("sliding_window", maximum=MAX_POSITIONS, missing=missing)
