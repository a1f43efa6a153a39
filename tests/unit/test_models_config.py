"""Configurations that others wrote: every wrong one is a usage error with its place."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sftplan.errors import UsageError
from sftplan.facts.catalogue import entries
from sftplan.facts.config import shape_from_config
from sftplan.facts.families import READERS
from sftplan.facts.fields import parse_object
from sftplan.facts.params import num_parameters

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def shape(**changes: object) -> ModelShape:
    config = {key: value for key, value in (LLAMA | changes).items() if value != "absent"}
    text = json.dumps(config, indent=2)
    return shape_from_config(config, name="m", source="config.json", text=text)


WRONG: list[tuple[dict[str, object], str]] = [
    ({"num_hidden_layers": -3}, "config.json:6: num_hidden_layers is -3; it must be between 1 and"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**18}, "num_hidden_layers is 1000000000000000000; it must be between"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers is an integer of 1329 bits"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true; an integer is needed"),
    ({"num_hidden_layers": "22"}, 'num_hidden_layers is "22"; an integer is needed'),
    ({"num_hidden_layers": 22.0}, "num_hidden_layers is 22.0; an integer is needed"),
    ({"num_hidden_layers": [22]}, "num_hidden_layers is a list; an integer is needed"),
    ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ({"hidden_size": "absent"}, "config.json: hidden_size is missing"),
    (
        {"hidden_size": 2049},
        "num_attention_heads is 32, which does not divide the hidden size 2049",
    ),
    ({"num_key_value_heads": 5}, "num_key_value_heads is 5, which does not divide the 32"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"head_dim": 63}, "head_dim is 63; rotary positions need an even one"),
    ({"hidden_act": "magic"}, 'hidden_act is "magic"; this activation is not modelled'),
    ({"hidden_act": 3}, "hidden_act is 3; a string is needed"),
    ({"attention_dropout": 2}, "attention_dropout is 2; a number from 0 to 1 is needed"),
    ({"attention_dropout": float("nan")}, "attention_dropout is NaN"),
    ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no"; true or false is needed'),
    ({"quantization_config": {"bits": 4}}, "quantization_config is there"),
    ({"model_type": "mambo"}, 'architecture "mambo" is not modelled'),
    ({"model_type": 7}, "model_type is 7; a string is needed"),
    ({"model_type": None}, "model_type is missing"),
    ({"model_type": "gemma3"}, "text_config is missing, which a gemma3 model needs"),
    ({"model_type": "gemma3", "text_config": 3}, "text_config is 3; an object is needed"),
    (
        {"model_type": "gpt2", "add_cross_attention": True, "n_head": 32},
        "add_cross_attention is true",
    ),
    ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm is true"),
    ({"model_type": "gpt_neox", "rotary_pct": 0}, "rotary_pct is 0"),
    ({"model_type": "gpt_neox", "rope_parameters": []}, "rope_parameters is a list"),
    (
        {"model_type": "mixtral", "num_experts_per_tok": 9},
        "num_experts_per_tok is 9, but there are 8",
    ),
    (
        {"model_type": "qwen3_moe", "mlp_only_layers": ["x"]},
        "mlp_only_layers must hold layer numbers",
    ),
    ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers is 3; a list is needed"),
    (
        {"model_type": "gemma2", "layer_types": ["full_attention"]},
        "layer_types names 1 layers of 22",
    ),
    ({"model_type": "gemma2", "layer_types": ["round"] * 22}, 'layer_types holds "round"'),
    ({"model_type": "gemma2", "attn_logit_softcapping": -1}, "attn_logit_softcapping is -1"),
    (
        {"model_type": "opt", "ffn_dim": 8, "layer_norm_elementwise_affine": False},
        "is false; norms",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG, ids=lambda case: str(case)[:50])
def test_wrong_fields_are_named(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        shape(**changes)
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"num_hidden_layers": "22"}, 'write it without quotes: "num_hidden_layers": 22'),
        ({"num_hidden_layers": 22.0}, 'write it as an integer: "num_hidden_layers": 22'),
        ({"hidden_size": "absent", "hidden_sise": 2048}, "did you mean hidden_sise?"),
        ({"model_type": "lama"}, "did you mean llama? known architectures: gpt2, llama, "),
    ],
)
def test_hints_say_what_to_do(changes: dict[str, object], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        shape(**changes)
    assert hint in (caught.value.hint or "")


def test_an_adapter_names_its_base_model() -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    with pytest.raises(UsageError, match="adapter") as caught:
        shape_from_config(config, name="m", source="adapter_config.json")
    assert caught.value.hint == "give its base model: gpt2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c:1:1: broken JSON"),
        ('{\n "a": 1,\n "b" 2}', "c:3:6: broken JSON: Expecting ':' delimiter"),
        ("[1, 2]", "c: holds a list, not a JSON object"),
        ("3", "c: holds 3, not a JSON object"),
        ('{\n"a": NaN}', "c:2: NaN is not a JSON value"),
        ('{"a": -Infinity}', "c:1: -Infinity is not a JSON value"),
        ("[" * 100_000, "c: nested too deeply"),
        ('{"a": ' * 100_000, "c: nested too deeply"),
        ('{\n\n"a": ' + "9" * 5000 + "}", "c:3: an integer with too many digits"),
    ],
    ids=lambda case: case[:20],
)
def test_broken_json_is_placed(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_object(text, "c")
    assert expected in caught.value.message


def test_missing_and_null_are_what_transformers_takes_them_for() -> None:
    """Absent is the class's default, null is "derive it"."""
    mistral = {"model_type": "mistral"}

    assert shape(num_key_value_heads="absent").num_kv_heads == 32
    assert shape(**mistral, num_key_value_heads="absent").num_kv_heads == 8
    assert shape(**mistral, num_key_value_heads=None).num_kv_heads == 32
    assert shape(**mistral).sliding_window == 4096
    assert shape(**mistral, sliding_window=None).sliding_window is None
    assert shape(model_type="qwen3").head_dim == 128
    assert shape(model_type="qwen3", head_dim=None).head_dim == 64


def test_windows_and_rotation() -> None:
    qwen = shape(model_type="qwen2", use_sliding_window=True, max_window_layers=20)
    phi = shape(model_type="phi", rope_parameters={"partial_rotary_factor": 0.4})

    assert qwen.layer_kinds == ("full",) * 20 + ("sliding",) * 2
    assert qwen.sliding_window == 4096
    assert shape(model_type="qwen2", sliding_window=4096).sliding_window is None
    assert phi.rotary_fraction == 0.4
    assert shape(rope_scaling={"rope_type": "yarn", "factor": 4.0}) == shape()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
read_keys = sorted({key for entry in entries() for key in entry.config} | {
    "text_config", "rope_parameters", "layer_types", "mlp_only_layers", "decoder_sparse_step",
    "n_inner", "quantization_config", "max_window_layers", "use_sliding_window",
})  # fmt: skip


UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@UNHURRIED
@given(st.dictionaries(st.sampled_from(read_keys), anything), st.sampled_from([*READERS, "gemma3"]))
def test_garbage_is_a_usage_error_or_a_model(garbage: dict[str, object], model_type: str) -> None:
    try:
        found = shape_from_config(garbage | {"model_type": model_type}, name="m", source="c")
    except UsageError:
        return
    assert num_parameters(found) > 0


@UNHURRIED
@given(st.sampled_from(entries()), st.sampled_from(read_keys), anything)
def test_one_wrong_field_is_a_usage_error_or_harmless(entry: Any, key: str, value: object) -> None:
    try:
        found = shape_from_config({**entry.config, key: value}, name="m", source="c")
    except UsageError:
        return
    assert num_parameters(found) > 0


@given(st.text())
@example('{"a": "\ud800"}')
@example("\ufeff{}")
def test_any_text_is_a_usage_error_or_an_object(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(parse_object(text, "c"), dict)
