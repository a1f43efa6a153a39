"""A Hugging Face config.json as a model's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.errors import UsageError
from sftplan.facts.families import READERS
from sftplan.facts.fields import Fields
from sftplan.facts.model import ModelShape
from sftplan.facts.unknown import traced_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT_PART_OF = {"gemma3": "gemma3_text"}  # published with a vision tower, trained here without it


def shape_from_config(
    config: Mapping[str, object],
    *,
    name: str,
    source: str,
    hub_id: str | None = None,
    text: str = "",
) -> ModelShape:
    """The shape that `config` describes; `source` begins every message, `text` gives it lines.

    >>> config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}
    >>> config["vocab_size"] = 50257
    >>> shape = shape_from_config(config, name="mine", source="config.json")
    >>> shape.intermediate_size, shape.max_positions, shape.tied_embeddings
    (3072, 1024, True)
    """
    fields = Fields(config, source, text)
    model_type = fields.word("model_type", default="")
    if model_type in _TEXT_PART_OF:
        inner = fields.inner("text_config")
        if inner is None:
            fields.fail("text_config", f"is missing, which a {model_type} model needs")
        fields, model_type = inner, _TEXT_PART_OF[model_type]
    if not model_type:
        raise _unknown(source, config)
    if config.get("quantization_config") is not None:
        problem = "is there: the weights are quantized, which full fine-tuning cannot train"
        fields.fail("quantization_config", problem, "give the model that it was quantized from")
    if model_type not in READERS:
        return traced_shape(config, name=name, source=source, hub_id=hub_id)
    shape = READERS[model_type](fields)
    return ModelShape(name=name, source=source, model_type=model_type, hub_id=hub_id, **shape)


def _unknown(source: str, config: Mapping[str, object]) -> UsageError:
    if "peft_type" in config:
        message = f"{source}: is the configuration of an adapter, not of a model"
        base = config.get("base_model_name_or_path")
        return UsageError(
            message, f"give its base model: {base}" if isinstance(base, str) else None
        )
    known = f"known architectures: {', '.join([*READERS, *_TEXT_PART_OF])}, and transformers' own"
    return UsageError(f"{source}: model_type is missing", known)
