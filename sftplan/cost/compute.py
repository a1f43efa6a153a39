"""FLOPs of training a token, linear layers and attention apart.

References:
    [PaLM] Chowdhery et al. 2022, arXiv:2204.02311, appendix B: 6N + 12·L·H·Q·T per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.params import num_active_parameters

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape

FORWARD_AND_BACKWARD = 3  # the backward pass of a product is two products


def linear_flops_per_token(model: ModelShape) -> int:
    """Products with weights, forward and backward: 6 per parameter a token meets in one.

    6·N, with N the parameters of matrices, the LM head's included, the embedding's look-up not.

    >>> from sftplan.facts.catalogue import builtin
    >>> linear_flops_per_token(builtin("gpt2-large"))  # 6 · (36 · 12 · 1280² + 50257 · 1280)
    4632706560
    """
    if model.anatomy is not None:
        return FORWARD_AND_BACKWARD * model.anatomy.product_flops
    return 2 * FORWARD_AND_BACKWARD * matrix_parameters(model)


def attention_flops_per_token(model: ModelShape, seq_len: int) -> int:
    """The two T×T products, forward and backward, at the full convention.

    12·L·H·Q·T                                                           [PaLM, appendix B]

    >>> from sftplan.facts.catalogue import builtin
    >>> attention_flops_per_token(builtin("gpt2-large"), 1024)  # 12 · 36 · 20 · 64 · 1024
    566231040
    """
    layers = model.num_layers if model.anatomy is None else model.anatomy.attention_layers
    return 4 * FORWARD_AND_BACKWARD * layers * model.query_size * seq_len


def matrix_parameters(model: ModelShape) -> int:
    """Parameters of the matrices that a token is multiplied with.

    >>> from sftplan.facts.catalogue import builtin
    >>> matrix_parameters(builtin("gpt2-large"))
    772117760
    """
    from sftplan.facts.params import parameters

    total = matrices = 0
    for parameter in parameters(model):
        total += parameter.num_elements
        if len(parameter.shape) > 1 and not parameter.name.endswith(TABLES):
            matrices += parameter.num_elements
    inactive = total - num_active_parameters(model)
    head = model.vocab_size * (model.embedding_size or model.hidden_size)
    return matrices - inactive + (head if model.tied_embeddings else 0)


TABLES = (
    "wte.weight",
    "wpe.weight",
    "embed_tokens.weight",
    "embed_in.weight",
    "embed_positions.weight",
)
