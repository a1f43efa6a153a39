"""Parameters of a model that transformers has listed, by layer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftplan.facts.model import Anatomy
    from sftplan.facts.tensors import Parameters


def layer_of(name: str, blocks: str) -> int | None:
    """The number of the layer that a tensor belongs to, None where it belongs to no single one.

    >>> layer_of("transformer.h.3.ln_1.weight", "transformer.h"), layer_of("lm_head.weight", "transformer.h")
    (3, None)
    """
    if not name.startswith(f"{blocks}."):
        return None
    number = name.removeprefix(f"{blocks}.").partition(".")[0]
    return int(number) if number.isdigit() else None


def listed(anatomy: Anatomy, num_layers: int) -> Parameters:
    """The parameters of the model with its first `num_layers` layers."""
    return tuple(
        parameter
        for parameter in anatomy.parameters
        if (layer_of(parameter.name, anatomy.blocks) or 0) < num_layers
    )


def block_counts(anatomy: Anatomy) -> Counter[int]:
    """Parameters of each layer."""
    found: Counter[int] = Counter()
    for parameter in anatomy.parameters:
        layer = layer_of(parameter.name, anatomy.blocks)
        if layer is not None:
            found[layer] += parameter.num_elements
    return found
