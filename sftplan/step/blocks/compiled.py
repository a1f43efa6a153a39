"""A block under torch.compile: one node forward, one backward, with the buffers that inductor allocates."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.facts.strategy import Attention, Checkpointing
from sftplan.step.blocks.compiled_work import block_work, formed_again_work, head_work
from sftplan.step.compiled import compiled_block
from sftplan.step.compiled.block import SUPPORTED
from sftplan.step.compiled.head import compiled_head
from sftplan.step.ops.attention import flash_backward_scratch
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.facts.model import ModelShape
    from sftplan.step.autograd import Node
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.compiled.graph import Buffer, Compiled, Graph
    from sftplan.step.tape import Tape

    Shapes = dict[str, tuple[int, ...]]

# What selective checkpointing keeps: results of products, and of the attention (train/checkpointing.py).
GIVEN = {
    Checkpointing.NONE: None,
    Checkpointing.SELECTIVE: frozenset(
        (
            "qkv",
            "q",
            "k",
            "v",
            "attended",
            "logsumexp",
            "attention.rng",
            "projected",
            "pre",
            "act",
            "up",
        )
    ),
    Checkpointing.FULL: frozenset[str](),
}
FIRST_PRODUCTS = ("qkv", "q", "d act", "logits", "d weight low")
LUMP = "biases and norms"  # gradients that compiled_block gives as one buffer


def can_compile(model: ModelShape) -> bool:
    """Whether it is known what a compiled block of this family keeps; others are planned as eager."""
    return model.family in SUPPORTED and not (model.sandwich_norms or model.post_norm)


@lru_cache(maxsize=256)
def _specification(
    model: ModelShape, tokens: int, weights: DType, autocast: DType | None, *, repeats: bool,
    given: frozenset[str] | None,
) -> Compiled:  # fmt: skip
    return compiled_block(
        model, tokens, weights=weights, autocast=autocast, repeats=repeats, given=given
    )


def compiled_layer(
    tape: Tape, context: Context, kind: Checkpointing, w: LayerWeights, x: Tensor
) -> Tensor:
    """The block as AOTAutograd and inductor run it."""
    tokens = x.shape[0] * x.shape[1]
    dtype = next(iter(w.values())).dtype
    grouped = context.model.num_kv_heads != context.model.num_heads
    repeats = grouped and context.strategy.attention is Attention.VARLEN  # before PyTorch 2.12
    plain, spec = (
        _specification(
            context.model, tokens, dtype, tape.autocast_dtype, repeats=repeats, given=given
        )
        for given in (None, GIVEN[kind])
    )
    inputs = (x, *w.values())
    node = tape.node("compiled", inputs, _backward, (x,))
    node.extra = (spec, plain, context, kind, list(w))
    held = _run(tape, spec.forward, {})
    block_work(tape, context, {name: v.shape for name, v in w.items()}, x, plain.forward, 1)
    out = held.pop(spec.forward.held["out"]).view(*x.shape)
    for buffer in spec.saved:
        tape.save(node, held.pop(buffer))
    out.node = node
    return out


def _read_again(w: Shapes, context: Context) -> Shapes:
    """The weights of what a checkpointed block computes again: not of products that are only added up.

    Forward and backward pass are one graph each, and AOTAutograd leaves out what nothing reads.
    """
    last: tuple[str, ...] = ("mlp.c_proj", "dense_4h_to_h", "fc2", "down_proj")
    if context.model.parallel_residual:
        last = (*last, "attention.dense")
    return {name: v for name, v in w.items() if not name.removesuffix(".weight").endswith(last)}


def _formed_again_bytes(plain: Compiled, family: Family) -> int:
    """What a plain block keeps beyond what products and the attention give."""
    given = GIVEN[Checkpointing.SELECTIVE] or frozenset()
    held = {name: buffer for name, buffer in plain.forward.held.items() if name != "out"}
    made = {"act", "q"} if family is Family.OPT else {"act", "q", "k"}  # rotated, or OPT's q scaled

    def is_given(name: str) -> bool:
        return name not in made and name.removesuffix(".raw") in given

    return sum(buffer.nbytes for name, buffer in held.items() if not is_given(name))


def _run(
    tape: Tape, graph: Graph, held: dict[Buffer, Tensor], attend: Callable[[], None] | None = None
) -> dict[Buffer, Tensor]:
    """Births and deaths of a graph's buffers; what is alive at its end, by buffer.

    `held` is what it begins with, and changes: a caller that kept it would keep all that dies.
    `attend` is called once the attention's gradients have their places: its kernels need more. The first
    product takes cuBLAS' workspace when its result has its place.
    """
    for born, buffer in graph.events:
        if born:
            held[buffer] = tape.empty(buffer.shape, buffer.dtype)
            if buffer.name in FIRST_PRODUCTS or buffer.name.endswith(".grad"):
                tape.touch_workspace()
            if buffer.name == "d v" and attend is not None:
                attend()
        else:
            held.pop(buffer, None)
    return held


def _backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    spec, plain, context, kind, names = node.extra
    x = saved[0]
    held = dict(zip(spec.saved, saved[1:], strict=True))
    saved.clear()
    node.saved.clear()
    alive = _run(tape, spec.backward, held, partial(_attention_scratch, tape, context, x))
    results = {name: alive[buffer] for name, buffer in spec.backward.held.items()}
    del alive, held
    w = dict(zip(names, (shape for shape, _ in node.inputs[1:]), strict=True))
    if kind is Checkpointing.FULL:
        block_work(tape, context, _read_again(w, context), x, plain.forward, 1)
    elif kind is Checkpointing.SELECTIVE:
        again = _formed_again_bytes(plain, context.model.family)
        formed_again_work(tape, context, x, again)
    block_work(tape, context, w, x, plain.backward, 2)
    low = tape.autocast_dtype or x.dtype
    columns = sum(shape[0] for name, shape in w.items() if _is_bias(name, w))
    tape.work("fused", x.dtype, 0, x.shape[0] * x.shape[1] * columns * low.size)
    out: list[Tensor | None] = [results["d in"].view(*x.shape)]
    places = _gradient_places(tuple(names), tuple(results))
    for place, (shape, dtype) in zip(places, node.inputs[1:], strict=True):
        out.append(Tensor(shape, dtype, results[place].storage))
    return out


def _is_bias(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether it is added to a product: its gradient is a sum over the rows of the product's."""
    stem, _, last = name.rpartition(".")
    return last == "bias" and len(shapes.get(f"{stem}.weight", ())) > 1


def _attention_scratch(tape: Tape, context: Context, x: Tensor) -> None:
    model, varlen = context.model, context.strategy.attention is Attention.VARLEN
    documents = (len(context.documents) or x.shape[0]) if varlen else 0
    flash_backward_scratch(
        tape, x.shape[0], model.num_heads, x.shape[1], model.head_dim, tape.autocast_dtype or x.dtype,
        documents=documents, grouped=not varlen and model.num_kv_heads != model.num_heads,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _gradient_places(names: tuple[str, ...], buffers: tuple[str, ...]) -> tuple[str, ...]:
    """For each weight the buffer that holds its gradient; biases and norms share one."""
    ends = [name for name in buffers if name.endswith(".grad")]

    def place(name: str) -> str:
        stem = name.removesuffix(".weight")
        own = (end for end in ends if stem.endswith(end.removesuffix(".grad")))
        return next(own, LUMP) if name.endswith(".weight") else LUMP

    return tuple(place(name) for name in names)


def compiled_loss(tape: Tape, model: ModelShape, weight: Tensor, x: Tensor) -> Tensor:
    """LM head and cross-entropy in one graph: (positions, d) and (V, d) to the loss."""
    spec = compiled_head(
        model.vocab_size,
        model.hidden_size,
        x.shape[0],
        weights=weight.dtype,
        autocast=tape.autocast_dtype,
    )
    node = tape.node("compiled", (x, weight), _loss_backward, (weight,))
    node.extra = spec
    held = _run(tape, spec.forward, {})
    head_work(tape, spec.forward, weight, x.shape[0], 1)
    for buffer in spec.saved:
        tape.save(node, held.pop(buffer, x))
    loss = held.pop(spec.forward.held["loss"])
    loss.node = node
    return loss


def _loss_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    spec: Compiled = node.extra
    weight = saved[0]
    held = dict(zip(spec.saved, saved[1:], strict=True))
    saved.clear()
    node.saved.clear()
    (hidden_shape, _), (weight_shape, _) = node.inputs
    alive = _run(tape, spec.backward, held)
    head_work(tape, spec.backward, weight, hidden_shape[0], 2)
    ends = {name.removesuffix(" low"): b for name, b in spec.backward.held.items()}
    return [
        alive[ends["d hidden"]].view(*hidden_shape),
        alive[ends["d weight"]].view(*weight_shape),  # or first rows, which nobody else holds
    ]
