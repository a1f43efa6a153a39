"""Configurations of transformers: from JSON's text, with fewer layers, and their fields by any name."""

from __future__ import annotations

import copy
import json
from typing import Any

from sftplan.errors import UsageError


def read_config(text: str) -> Any:
    """The configuration of a causal language model.

    Raises:
        UsageError: transformers has no such model, or cannot read the configuration.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    fields = json.loads(text)
    name = fields["model_type"]
    if name not in CONFIG_MAPPING:
        message = f"transformers {transformers.__version__} does not know it either"
        raise UsageError(message)
    try:
        config = transformers.AutoConfig.for_model(**fields)
    except Exception as error:
        message = f"transformers cannot read the configuration: {first_line(error)}"
        raise UsageError(message) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        message = "transformers has no causal language model of it"
        raise UsageError(message)
    if getattr(config, "is_decoder", True) is False:
        message = "it is an encoder: is_decoder is false"
        raise UsageError(message, 'a decoder\'s configuration says "is_decoder": true')
    return config


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def with_layers(config: Any, num_layers: int) -> Any:
    """The configuration of its first layers: lists with an entry per layer are cut too."""
    whole = config.num_hidden_layers
    if whole == num_layers:
        return config
    few = copy.deepcopy(config)
    few.num_hidden_layers = num_layers
    for key, value in list(vars(few).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(few, key, value[:num_layers])
    return few


def first(config: Any, *names: str, default: Any) -> Any:
    """The first of these fields that is there and is not null."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default
