"""The largest of a model's parts, which decide on buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.anatomy import block_counts
from sftplan.facts.params import embeddings, first_sparse, head, layer
from sftplan.facts.tensors import count

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape


def largest_block(model: ModelShape) -> int:
    """Parameters of the block that has most.

    >>> from sftplan.facts.catalogue import builtin
    >>> largest_block(builtin("gpt2-large"))
    19677440
    """
    if model.anatomy is not None:
        return max(block_counts(model.anatomy).values())
    return max(count(layer(model, index)) for index in {0, model.num_layers - 1})


def largest_weight(model: ModelShape) -> int:
    """Elements of the largest single weight: mostly the table of tokens.

    >>> from sftplan.facts.catalogue import builtin
    >>> largest_weight(builtin("gpt2-large"))
    64328960
    """
    if model.anatomy is not None:
        return max(weight.num_elements for weight in model.anatomy.parameters)
    some = [*embeddings(model), *layer(model, first_sparse(model)), *head(model)]
    return max(weight.num_elements for weight in some)
