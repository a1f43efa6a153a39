"""Shapes, names and order of every built-in model's parameters, against transformers itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.facts.catalogue import builtin, entries
from sftplan.facts.config import shape_from_config
from sftplan.facts.params import num_parameters, parameters

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 100}
    | {"vocab_size": 128, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "gpt2-untied": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
    | {"vocab_size": 128, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"model_type": "llama"} | GROUPED,
    "llama-null-kv": {"model_type": "llama", "num_key_value_heads": None} | SMALL,
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True} | GROUPED,
    "llama-head-dim": {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": True}
    | GROUPED,
    "mistral": {"model_type": "mistral"} | GROUPED,
    "mistral-null-head-dim": {"model_type": "mistral", "head_dim": None} | GROUPED,
    "qwen2": {"model_type": "qwen2"} | GROUPED,
    "qwen3": {"model_type": "qwen3"} | GROUPED,
    "qwen3-biases": {"model_type": "qwen3", "attention_bias": True, "head_dim": 16} | GROUPED,
    "gemma": {"model_type": "gemma"} | GROUPED,
    "gemma-missing-kv": {"model_type": "gemma"} | SMALL | {"num_attention_heads": 16},
    "gemma2": {"model_type": "gemma2"} | GROUPED,
    "gemma3-text": {"model_type": "gemma3_text", "attention_bias": True} | GROUPED,
    "phi": {"model_type": "phi"} | SMALL,
    "phi-tied": {"model_type": "phi", "tie_word_embeddings": True} | GROUPED,
    "phi3": {"model_type": "phi3"} | GROUPED,
    "neox": {"model_type": "gpt_neox"} | SMALL,
    "neox-no-bias": {"model_type": "gpt_neox", "attention_bias": False} | SMALL,
    "opt": {"model_type": "opt", "ffn_dim": 96} | SMALL,
    "opt-projected": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32} | SMALL,
    "opt-post-norm": {"model_type": "opt", "ffn_dim": 96, "do_layer_norm_before": False} | SMALL,
    "opt-no-bias": {"model_type": "opt", "ffn_dim": 96, "enable_bias": False} | SMALL,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4} | GROUPED,
    "qwen2-moe": {"model_type": "qwen2_moe", "mlp_only_layers": [1]} | GROUPED,
    "qwen2-moe-all-dense": {"model_type": "qwen2_moe", "mlp_only_layers": [0, 1, 2]} | GROUPED,
    "qwen2-moe-no-bias": {"model_type": "qwen2_moe", "qkv_bias": False} | GROUPED,
    "qwen3-moe": {"model_type": "qwen3_moe", "decoder_sparse_step": 2} | GROUPED,
    "qwen3-moe-biases": {"model_type": "qwen3_moe", "attention_bias": True} | GROUPED,
}


def assert_same_parameters(config: dict[str, Any], shape: ModelShape) -> None:
    built = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    expected = [(name, tuple(tensor.shape)) for name, tensor in model.named_parameters()]

    assert [(each.name, each.shape) for each in parameters(shape)] == expected
    assert num_parameters(shape) == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_builtin_models_have_the_parameters_of_transformers(entry: Any) -> None:
    """Same names, same shapes, same order, same sum."""
    assert_same_parameters(dict(entry.config), builtin(entry.name))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_parameters_of_transformers(name: str) -> None:
    config = VARIANTS[name]
    assert_same_parameters(config, shape_from_config(config, name=name, source="test"))


@pytest.mark.parametrize("name", VARIANTS)
def test_written_configurations_are_read_back_alike(name: str) -> None:
    """What transformers saves, with all its defaults spelled out, is the same shape."""
    config = VARIANTS[name]
    saved = transformers.AutoConfig.for_model(**config).to_dict()

    short = shape_from_config(config, name=name, source="test")
    assert shape_from_config(saved, name=name, source="test") == short


def test_attention_windows_are_those_of_transformers() -> None:
    for entry in entries():
        built = transformers.AutoConfig.for_model(**entry.config)
        shape = builtin(entry.name)
        listed = getattr(built, "layer_types", None) or []
        if len(set(listed)) > 1:
            expected = tuple(kind.removesuffix("_attention") for kind in listed)

            assert (shape.layer_kinds, shape.sliding_window) == (expected, built.sliding_window)
        else:
            assert shape.layer_kinds == ()
            assert shape.sliding_window == (getattr(built, "sliding_window", None) or None)


def test_gemma_3_with_a_vision_tower_is_its_text_part() -> None:
    """Gemma 3's published files leave most of the text model to the defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}  # type: ignore[dict-item]
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}

    shape = shape_from_config(
        config, name="gemma-3-4b", source="builtin", hub_id=builtin("gemma-3-4b").hub_id
    )
    assert shape == builtin("gemma-3-4b")
