"""Forward pass and loss of a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sftplan.facts.anatomy import layer_of
from sftplan.facts.model import Family
from sftplan.facts.params import parameters
from sftplan.facts.strategy import Attention, Checkpointing
from sftplan.step.blocks import BLOCKS, OTHER_MODULES
from sftplan.step.blocks.compiled import can_compile, compiled_layer
from sftplan.step.blocks.context import Context, rotary_tables
from sftplan.step.blocks.llama import norm
from sftplan.step.ops.lookup import embedding
from sftplan.step.ops.matmul import linear
from sftplan.step.ops.pointwise import add, dropout, scale
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Storage


@dataclass(slots=True)
class Weights:
    """The parameters on the GPU: those of each layer by their name within it, and the others."""

    layers: list[dict[str, Tensor]] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    ordered: list[tuple[int | None, Tensor]] = field(default_factory=list)


def build_weights(tape: Tape, model: ModelShape, dtype: DType, *, on_host: bool = False) -> Weights:
    """Allocate the parameters in `model.parameters()` order, on the GPU unless said otherwise."""
    weights = Weights(layers=[{} for _ in range(model.num_layers)])
    for parameter in parameters(model):
        number, name = _layer_of(parameter.name, model)
        tape.owner = number
        tensor = tape.parameter(parameter.shape, dtype, on_host=on_host)
        weights.ordered.append((number, tensor))
        if number is None:
            weights.others[parameter.name] = tensor
        else:
            weights.layers[number][name] = tensor
    return weights


def build_buffers(tape: Tape, model: ModelShape) -> list[Storage]:
    """Allocate what a traced model holds beside its parameters."""
    found: list[Storage] = []
    if model.anatomy is None:
        return found
    for name, num_bytes in model.anatomy.buffers:
        number = layer_of(name, model.anatomy.blocks)
        if number is None or number < model.num_layers:
            tape.enter(number)
            found.append(tape.storage(num_bytes, "weights"))
    tape.enter(None)
    return found


def _layer_of(name: str, model: ModelShape) -> tuple[int | None, str]:
    """The number of the layer and the name within it.

    >>> from sftplan.facts.catalogue import builtin
    >>> gpt2 = builtin("gpt2")
    >>> _layer_of("transformer.h.3.ln_1.weight", gpt2), _layer_of("lm_head.weight", gpt2)
    ((3, 'ln_1.weight'), (None, 'lm_head.weight'))
    """
    if model.anatomy is not None:
        return layer_of(name, model.anatomy.blocks), name
    _, dot, rest = name.partition(".layers." if ".layers." in name else ".h.")
    number, _, inner = rest.partition(".")
    return (int(number), inner) if dot else (None, name)


def hidden_states(
    tape: Tape,
    model: ModelShape,
    strategy: Strategy,
    weights: Weights,
    ids: Tensor,
    documents: tuple[int, ...] = (),
) -> Tensor:
    """Embedding, blocks and final norm; (B, T, d)."""
    tokens, positions = _embeddings(
        tape, model, strategy, weights, ids
    )  # alive to the end, as in transformers
    tables = None
    if positions is None:
        tables = rotary_tables(tape, model, _counted(model, strategy, ids), tokens.dtype)
    context = Context(model=model, strategy=strategy, tables=tables, documents=documents)
    x = tokens if positions is None else add(tape, tokens, positions)
    x = dropout(tape, x, model.embedding_dropout)
    eager = strategy.attention is Attention.EAGER
    compiles = strategy.compile and can_compile(model) and not eager
    for number, layer in enumerate(weights.layers):
        tape.mark("forward", number)
        kind = strategy.checkpointing_at(number)
        if compiles:  # checkpointing is part of the block
            x = compiled_layer(tape, context, kind, layer, x)
        elif kind is Checkpointing.NONE:
            x = _layer(tape, context, number, layer, x)
        else:
            selective = kind is Checkpointing.SELECTIVE
            call = partial(_layer, tape, context, number, layer)
            x = tape.checkpoint(call, x, selective=selective)
            del call
        x = boundary(tape, number, x)
    tape.mark("forward end")
    x = _final_norm(tape, context, weights, x)
    return _projected(tape, weights, "project_out", x)


def _final_norm(tape: Tape, context: Context, weights: Weights, x: Tensor) -> Tensor:
    name = next(
        (n for n in weights.others if n.removesuffix(".weight").endswith(FINAL_NORMS)), None
    )
    return (
        x if name is None else norm(tape, context, weights.others, name.removesuffix(".weight"), x)
    )


def boundary(tape: Tape, number: int, x: Tensor) -> Tensor:
    """Nothing but a mark on the tape where the backward pass enters a layer."""
    assert x.node is not None
    node = tape.silent_node((x,), _enter_layer)
    node.extra = number
    out = x.detach()
    out.node = node
    return out


def _enter_layer(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    layer = node.extra
    assert isinstance(layer, int)
    tape.mark("backward", layer)
    return gradients


def _layer(
    tape: Tape, context: Context, number: int, layer: dict[str, Tensor], x: Tensor
) -> Tensor:
    family = context.model.family
    tape.host("module", times=OTHER_MODULES[family])
    return BLOCKS[family](tape, context, number, layer, x)


def _counted(model: ModelShape, strategy: Strategy, ids: Tensor) -> tuple[int, int]:
    """The shape of the positions: each token's, where documents are packed or rows lie in one; else one row's.

    OPT counts in every row, by the mask.
    """
    told = strategy.packing or strategy.attention is Attention.VARLEN or model.family is Family.OPT
    rows, length = ids.shape
    return (rows, length) if told else (1, length)


def _embeddings(
    tape: Tape, model: ModelShape, strategy: Strategy, weights: Weights, ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    table = next(w for name, w in weights.others.items() if name.endswith(TOKEN_TABLES))
    tokens = embedding(tape, ids, table)
    tokens = _projected(tape, weights, "project_in", tokens)
    if model.embedding_scale:
        tokens = scale(tape, tokens)
    position = next((w for n, w in weights.others.items() if n.endswith(POSITION_TABLES)), None)
    if position is None:
        return tokens, None
    return tokens, embedding(
        tape, tape.empty(_counted(model, strategy, ids), DType.INT64), position
    )


def _projected(tape: Tape, weights: Weights, name: str, x: Tensor) -> Tensor:
    """To the blocks' width or back, where the embedding has another: OPT-350m."""
    weight = next((w for n, w in weights.others.items() if n.endswith(f"{name}.weight")), None)
    return x if weight is None else linear(tape, x, weight)


TOKEN_TABLES = ("wte.weight", "embed_tokens.weight", "embed_in.weight")
FINAL_NORMS = ("ln_f", "final_layer_norm", "final_layernorm", ".norm")
POSITION_TABLES = ("wpe.weight", "embed_positions.weight")


def head_of(weights: Weights) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the LM head; the weight is the embedding's where they are tied."""
    weight = weights.others.get("lm_head.weight")
    if weight is None:
        weight = next(w for name, w in weights.others.items() if name.endswith(TOKEN_TABLES))
    return weight, weights.others.get("lm_head.bias")
