"""Models whose family is not modelled: transformers builds them, in a process of its own, and tells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sftplan.errors import NotReadyError, UsageError, did_you_mean
from sftplan.facts.dimensions import MAX_LAYERS, MAX_POSITIONS, MAX_SIZE, MAX_VOCAB
from sftplan.facts.fields import show_value
from sftplan.facts.model import Anatomy, Family, ModelShape
from sftplan.facts.tensors import Parameter
from sftplan.facts.tracing import ask, require_packages

if TYPE_CHECKING:
    from collections.abc import Mapping

MAXIMA = {
    "num_layers": MAX_LAYERS, "hidden_size": MAX_SIZE, "vocab_size": MAX_VOCAB,
    "max_positions": MAX_POSITIONS,
}  # fmt: skip


def traced_shape(
    config: Mapping[str, object], *, name: str, source: str, hub_id: str | None = None
) -> ModelShape:
    """The shape of any causal language model that transformers can build without its weights.

    Raises:
        NotReadyError: PyTorch or transformers is not installed, or cannot build it.
        UsageError: transformers does not know the architecture, or the configuration is broken.
    """
    model_type = str(config["model_type"])
    unknown = f"{source}: architecture {show_value(model_type)} is not modelled"
    require_packages(f"{unknown} and has to be traced")
    text = json.dumps(config, sort_keys=True)
    try:
        found = ask({"what": "anatomy", "config": text})
    except (UsageError, NotReadyError) as error:
        message = f"{unknown}, and {error.message}"
        raise type(error)(message, error.hint or _hint(model_type)) from None
    sizes: dict[str, Any] = found["sizes"]
    for key, most in MAXIMA.items():
        if not 0 < sizes[key] <= most:
            message = f"{source}: {key} is {sizes[key]:,}, which is not between 1 and {most:,}"
            raise UsageError(message)
    return ModelShape(
        name=name, source=source, model_type=model_type, hub_id=hub_id, family=Family.TRACED,
        anatomy=_anatomy(text, found), **sizes,
    )  # fmt: skip


def _anatomy(config: str, found: Mapping[str, Any]) -> Anatomy:
    return Anatomy(
        config=config,
        parameters=tuple(Parameter(name, tuple(shape)) for name, shape in found["parameters"]),
        buffers=tuple((name, size) for name, size in found["buffers"]),
        tables=tuple(found["tables"]),
        blocks=found["blocks"],
        alike=found["alike"],
        product_flops=found["product_flops"],
        idle_parameters=found["idle_parameters"],
        attention_layers=found["attention_layers"],
        attentions=tuple(found["attentions"]),
        plain_head=found["plain_head"],
        takes_positions=found["takes_positions"],
    )


def _hint(model_type: str) -> str:
    from sftplan.facts.families import READERS

    close = did_you_mean(model_type[:100], READERS)
    known = f"known architectures: {', '.join(READERS)}"
    return f"{close} {known}" if close else known
