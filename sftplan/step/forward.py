"""Forward pass and loss of a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sftplan.facts.model import Family, ModelShape
from sftplan.facts.params import parameters
from sftplan.facts.strategy import Checkpointing, Strategy
from sftplan.step.blocks import BLOCKS
from sftplan.step.blocks.context import Context, rotary_tables
from sftplan.step.blocks.llama import norm
from sftplan.step.ops.lookup import cross_entropy, embedding
from sftplan.step.ops.matmul import linear
from sftplan.step.ops.pointwise import add, dropout, scale
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from sftplan.step.tape import Tape


@dataclass(slots=True)
class Weights:
    """The parameters on the GPU: those of each layer by their name within it, and the others."""

    layers: list[dict[str, Tensor]] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    ordered: list[Tensor] = field(default_factory=list)


def build_weights(tape: Tape, model: ModelShape, dtype: DType) -> Weights:
    """Allocate the parameters in `model.parameters()` order."""
    weights = Weights(layers=[{} for _ in range(model.num_layers)])
    for parameter in parameters(model):
        tensor = tape.parameter(parameter.shape, dtype)
        weights.ordered.append(tensor)
        prefix, number, name = _layer_of(parameter.name)
        if number is None:
            weights.others[parameter.name] = tensor
        else:
            weights.layers[number][name] = tensor
    return weights


def _layer_of(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :])
    return "", None, name


def hidden_states(
    tape: Tape, model: ModelShape, strategy: Strategy, weights: Weights, ids: Tensor
) -> Tensor:
    """Embedding, blocks and final norm; (B, T, d)."""
    tokens, positions = _embeddings(tape, model, weights, ids)  # alive to the end, as in transformers
    tables = None
    if positions is None:
        tables = rotary_tables(tape, model, ids.shape[1], tokens.dtype)
    context = Context(model=model, strategy=strategy, tables=tables)
    x = tokens if positions is None else add(tape, tokens, positions)
    x = dropout(tape, x, model.embedding_dropout)
    for number, layer in enumerate(weights.layers):
        tape.mark(f"forward {number}")
        if strategy.checkpointing is Checkpointing.NONE:
            x = BLOCKS[model.family](tape, context, number, layer, x)
        else:
            x = tape.checkpoint(_layer_call(tape, context, number, layer), x)
    tape.mark("forward end")
    x = _final_norm(tape, context, weights, x)
    return x  # noqa: RET504


def _final_norm(tape: Tape, context: Context, weights: Weights, x: Tensor) -> Tensor:
    name = next((n for n in weights.others if n.removesuffix(".weight").endswith(FINAL_NORMS)), None)
    return x if name is None else norm(tape, context, weights.others, name.removesuffix(".weight"), x)


def _layer_call(tape: Tape, context: Context, number: int, layer: dict[str, Tensor]):
    block = BLOCKS[context.model.family]

    def call(x: Tensor) -> Tensor:
        return block(tape, context, number, layer, x)

    return call


def _embeddings(
    tape: Tape, model: ModelShape, weights: Weights, ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    table = next(w for name, w in weights.others.items() if name.endswith(TOKEN_TABLES))
    tokens = embedding(tape, ids, table)
    if model.embedding_scale:
        tokens = scale(tape, tokens)
    position = next((w for n, w in weights.others.items() if n.endswith(POSITION_TABLES)), None)
    if position is None:
        return tokens, None
    return tokens, embedding(tape, tape.empty((1, ids.shape[1]), DType.INT64), position)


TOKEN_TABLES = ("wte.weight", "embed_tokens.weight", "embed_in.weight")
FINAL_NORMS = ("ln_f", "final_layer_norm", "final_layernorm", ".norm")
POSITION_TABLES = ("wpe.weight", "embed_positions.weight")


def logits_of(tape: Tape, model: ModelShape, weights: Weights, x: Tensor) -> Tensor:
    head = weights.others.get("lm_head.weight") or weights.others.get("embed_out.weight")
    if head is None:
        head = next(w for name, w in weights.others.items() if name.endswith(TOKEN_TABLES))
    kind, tape.kind = tape.kind, "logits"
    out = linear(tape, x, head)
    tape.kind = kind
    return out


def full_loss(tape: Tape, model: ModelShape, weights: Weights, x: Tensor, targets: Tensor) -> Tensor:
    """transformers' own loss: all positions, in fp32."""
    logits = logits_of(tape, model, weights, x)
    return causal_lm_loss(tape, logits, targets)


def causal_lm_loss(tape: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """transformers' ForCausalLMLoss: logits to fp32, targets padded by one and shifted."""
    kind, tape.kind = tape.kind, "logits"
    logits = tape.cast(logits, DType.FP32)
    padded = tape.empty((targets.shape[0], targets.shape[1] + 1), DType.INT64)
    targets = tape.empty(targets.shape, DType.INT64)
    loss = cross_entropy(tape, logits, targets)
    tape.kind = kind
    return loss
