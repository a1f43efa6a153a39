"""The built-in models: names, published numbers, and what loading them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sftplan.errors import UsageError
from sftplan.facts.catalogue import builtin, builtin_names, find_builtin, suggest_builtin
from sftplan.facts.params import (
    embeddings,
    final_norm,
    head,
    layer,
    num_active_parameters,
    num_parameters,
    parameters,
)
from sftplan.facts.tensors import count

# As the hub shows them.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "pythia-1b": 1_011_781_632,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "gpt-neox-20b": 20_554_567_680,
}
TIED = [
    "gpt2",
    "gpt2-xl",
    "opt-125m",
    "opt-66b",
    "gemma-2b",
    "gemma-2-27b",
    "gemma-3-27b",
    "smollm2-1.7b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "qwen2.5-0.5b",
    "qwen2.5-3b",
    "qwen3-0.6b",
    "qwen3-4b",
    "phi-4-mini",
]
UNTIED = [
    "tinyllama-1.1b",
    "llama-2-7b",
    "llama-3-8b",
    "llama-3.1-405b",
    "mistral-7b",
    "mixtral-8x7b",
    "pythia-1b",
    "phi-2",
    "phi-3-mini",
    "phi-4",
    "qwen2.5-7b",
    "qwen2.5-72b",
    "qwen3-8b",
    "qwen3-30b-a3b",
]


def test_there_are_many_and_no_name_is_twice() -> None:
    names = builtin_names()

    assert len(names) >= 40
    assert len(set(names)) == len(names)
    assert all(name == name.lower() for name in names)


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_published_numbers(name: str, expected: int) -> None:
    assert num_parameters(builtin(name)) == expected


@pytest.mark.parametrize("name", builtin_names())
def test_parts_add_up(name: str) -> None:
    """The list, the sum over parts and the closed form agree; no tensor is there twice."""
    model = builtin(name)
    listed = parameters(model)
    around = (*embeddings(model), *final_norm(model), *head(model))
    layers = [each for index in range(model.num_layers) for each in layer(model, index)]

    assert num_parameters(model) == count(listed) == count(around) + count(layers)
    assert len({each.name for each in listed}) == len(listed)
    assert num_active_parameters(model) <= num_parameters(model)
    assert (num_active_parameters(model) < num_parameters(model)) == (model.experts is not None)


def test_weight_decay_acts_on_matrices_only() -> None:
    """Pythia: 4 products a layer and two embeddings; biases and norms are left alone."""
    listed = parameters(builtin("pythia-70m"))

    # 4 * 6 + 2 = 26
    assert sum(each.decayed for each in listed) == 26
    assert not any(each.decayed for each in listed if each.name.endswith(".bias"))
    assert all(each.decayed for each in listed if "experts" in each.name)


@pytest.mark.parametrize("name", TIED)
def test_tied(name: str) -> None:
    assert builtin(name).tied_embeddings


@pytest.mark.parametrize("name", UNTIED)
def test_untied(name: str) -> None:
    assert not builtin(name).tied_embeddings


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("GPT2-XL", "gpt2-xl"),
        ("openai-community/gpt2-large", "gpt2-large"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("Meta-Llama-3-8B", "llama-3-8b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("qwen/qwen2.5-0.5b", "qwen2.5-0.5b"),
        ("tinyllama", "tinyllama-1.1b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b-chat-v1.0"),
        (" gpt2 ", "gpt2"),
        ("microsoft/phi-1_5", "phi-1.5"),
    ],
)
def test_spellings(spelled: str, name: str) -> None:
    model = builtin(spelled)

    assert model.name == name
    assert model.source == "builtin"


def test_a_variant_keeps_its_hub_id_and_its_difference() -> None:
    base, instruct = builtin("mixtral-8x22b"), builtin("mixtral-8x22b-instruct-v0.1")

    assert (base.vocab_size, instruct.vocab_size) == (32_000, 32_768)
    assert instruct.hub_id == "mistralai/Mixtral-8x22B-Instruct-v0.1"


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(UsageError, match="'gpt2-larg' is not a built-in model") as caught:
        builtin("gpt2-larg")
    assert caught.value.hint is not None
    assert "did you mean gpt2-large?" in caught.value.hint
    assert find_builtin("gpt2-larg") is None
    assert suggest_builtin("%%%") == "`sftplan models` lists the built-in models"


def test_loading_a_model_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sftplan.facts.resolve import resolve_model; resolve_model('gpt2');"
        "heavy = {'torch', 'transformers', 'numpy', 'click', 'rich', 'pydantic', 'urllib.request'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
