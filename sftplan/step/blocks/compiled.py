"""A block under torch.compile: one node forward, one backward, with the buffers that inductor allocates."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.facts.strategy import Attention, Checkpointing
from sftplan.step.compiled import compiled_block
from sftplan.step.compiled.block import SUPPORTED
from sftplan.step.compiled.graph import Buffer
from sftplan.step.compiled.head import HEAD_MULTIPLE, compiled_head
from sftplan.step.ops.attention import flash_backward_scratch, kernel_shape, rowwise_flops
from sftplan.step.ops.matmul import matmul
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.facts.model import ModelShape
    from sftplan.step.autograd import Node
    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.compiled.graph import Compiled, Graph
    from sftplan.step.tape import Tape

# What selective checkpointing keeps: results of products, and of the attention (train/checkpointing.py).
GIVEN = frozenset(
    ("qkv", "q", "k", "v", "attended", "logsumexp", "attention.rng", "projected", "pre", "up")
)
LUMP = "biases and norms"  # gradients that compiled_block gives as one buffer


def can_compile(model: ModelShape) -> bool:
    """Whether it is known what a compiled block of this family keeps; others are planned as eager."""
    return model.family in SUPPORTED and not (model.sandwich_norms or model.post_norm)


@lru_cache(maxsize=64)
def _specification(
    model: ModelShape, tokens: int, weights: DType, autocast: DType | None, *, repeats: bool
) -> Compiled:
    return compiled_block(model, tokens, weights=weights, autocast=autocast, repeats=repeats)


def compiled_layer(tape: Tape, context: Context, number: int, w: LayerWeights, x: Tensor) -> Tensor:
    """The block as AOTAutograd and inductor run it."""
    tokens = x.shape[0] * x.shape[1]
    dtype = next(iter(w.values())).dtype
    grouped = context.model.num_kv_heads != context.model.num_heads
    repeats = grouped and context.strategy.attention is Attention.VARLEN  # before PyTorch 2.12
    spec = _specification(context.model, tokens, dtype, tape.autocast_dtype, repeats=repeats)
    inputs = (x, *w.values())
    node = tape.node("compiled", inputs, _backward, (x,))
    node.extra = (spec, context, list(w))
    held = _run(tape, spec.forward, {})
    _work(tape, context, _read_again(w, context) if tape.recomputes else w, x, spec.forward, 1)
    out = held.pop(spec.forward.held["out"].name).view(*x.shape)
    for buffer in _kept(spec, context):
        kept = held.pop(buffer.name, None)
        tape.save(node, tape.empty(buffer.shape, buffer.dtype) if kept is None else kept)
    out.node = node
    return out


def _read_again(w: LayerWeights, context: Context) -> LayerWeights:
    """The weights of what a checkpointed block computes again: not of products that are only added up.

    Forward and backward pass are one graph each, and AOTAutograd leaves out what nothing reads.
    """
    last: tuple[str, ...] = ("mlp.c_proj", "dense_4h_to_h", "fc2", "down_proj")
    if context.model.parallel_residual:
        last = (*last, "attention.dense")
    return {name: v for name, v in w.items() if not name.removesuffix(".weight").endswith(last)}


def _kept(spec: Compiled, context: Context) -> list[Buffer]:
    """What is saved: under selective checkpointing only what products and attention gave."""
    if context.strategy.checkpointing is not Checkpointing.SELECTIVE:
        return list(spec.saved)
    named = {b.name: b for b in spec.saved}
    kept = [b for b in spec.saved if b.name.removesuffix(" read") in GIVEN]
    kept = [b for b in kept if b.name.removesuffix(" read") not in named or b.name in GIVEN]
    if "qkv" in named:  # q and k are made of it again
        kept = [b for b in kept if b.name not in ("q", "k")]
    for part in "kv":  # copied to all heads again
        if f"{part} repeated" in named and part not in named:
            kept.append(Buffer(part, (kept[0].shape[0], context.model.kv_size), kept[0].dtype))
    if "pre" not in named:  # ReLU: what enters it is as large as what comes out
        kept.append(named["act"])
    return kept


def _run(
    tape: Tape, graph: Graph, held: dict[str, Tensor], attend: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Births and deaths of a graph's buffers; what is alive at its end, by buffer.

    `held` is what it begins with, and changes: a caller that kept it would keep all that dies.
    `attend` is called once the attention's gradients have their places: its kernels need more.
    """
    for born, buffer in graph.events:
        if born:
            held[buffer.name] = tape.empty(buffer.shape, buffer.dtype)
            if buffer.name == "d v" and attend is not None:
                attend()
        else:
            held.pop(buffer.name, None)
    return held


def _backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    spec, context, names = node.extra
    x = saved[0]
    kept = _kept(spec, context)
    held = {b.name: t for b, t in zip(kept, saved[1:], strict=True)}
    again = [b for b in spec.saved if b.name not in held]
    held |= {b.name: tape.empty(b.shape, b.dtype) for b in again}
    # written once: what they are computed from the kernels beside them read anyway
    tape.work("fused", x.dtype, 0, sum(b.nbytes for b in again))
    saved.clear()
    node.saved.clear()
    alive = _run(tape, spec.backward, held, partial(_attention_scratch, tape, context, x))
    results = {name: alive[buffer.name] for name, buffer in spec.backward.held.items()}
    del alive, held
    w = dict(zip(names, (shape for shape, _ in node.inputs[1:]), strict=True))
    _work(
        tape, context, None, x, spec.backward, 2, [shape for shape in w.values() if len(shape) > 1]
    )
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


def _work(
    tape: Tape,
    context: Context,
    w: LayerWeights | None,
    x: Tensor,
    graph: Graph,
    products: int,
    shapes: list[tuple[int, ...]] | None = None,
) -> None:
    """The products, the attention, and one pass over every buffer for what is fused between them."""
    model = context.model
    tokens = x.shape[0] * x.shape[1]
    dtype = tape.autocast_dtype or x.dtype
    low = Tensor((), dtype, x.storage)
    if w is not None:
        shapes = [v.shape for v in w.values() if len(v.shape) > 1]
    for shape in shapes or ():
        for _ in range(products):
            matmul(tape, "linear", tokens, shape[0], shape[1], low)
    flops = rowwise_flops(
        x.shape[0], model.num_heads, x.shape[1], model.head_dim, context.documents
    )
    moved = 2 * tokens * (model.query_size + model.kv_size) * dtype.size * products
    if products == 1 and model.residual_dropout and model.family is Family.OPT:  # others are hashed
        tape.work("random", dtype, 0, 2 * tokens * model.hidden_size)
    kind, work = kernel_shape(
        "flash" if products == 1 else "flash_backward", x.shape[0], model.num_heads, x.shape[1],
        model.head_dim, context.documents,
    )  # fmt: skip
    tape.work(kind, dtype, flops * products, moved, *work)
    tape.work("fused", dtype, 0, 2 * graph.written_bytes)


def compiled_loss(tape: Tape, model: ModelShape, weight: Tensor, x: Tensor) -> Tensor:
    """LM head and cross-entropy in one graph: (positions, d) and (V, d) to the loss."""
    spec = compiled_head(
        model.vocab_size,
        model.hidden_size,
        x.shape[0],
        weights=weight.dtype,
        autocast=tape.autocast_dtype,
    )
    node = tape.node("compiled", (x, weight), _loss_backward, (x, weight))
    node.extra = spec
    held = _run(tape, spec.forward, {})
    _head_work(tape, spec.forward, x, weight, 1)
    for buffer in spec.saved:
        tape.save(node, held.pop(buffer.name))
    loss = held.pop("loss")
    loss.node = node
    return loss


def _loss_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    spec: Compiled = node.extra
    x, weight = saved[:2]
    held = {b.name: t for b, t in zip(spec.saved, saved[2:], strict=True)}
    saved.clear()
    node.saved.clear()
    _head_work(tape, spec.backward, x, weight, 2)
    alive = _run(tape, spec.backward, held)
    ends = {name.removesuffix(" low"): b.name for name, b in spec.backward.held.items()}
    return [
        alive[ends["d hidden"]].view(*node.inputs[0][0]),
        alive[ends["d weight"]].view(*node.inputs[1][0]),
    ]


def _head_work(tape: Tape, graph: Graph, x: Tensor, weight: Tensor, products: int) -> None:
    low = Tensor((), tape.autocast_dtype or x.dtype, x.storage)
    columns = -(-weight.shape[0] // HEAD_MULTIPLE) * HEAD_MULTIPLE
    for _ in range(products):
        matmul(tape, "linear", x.shape[0], columns, x.shape[1], low)
    tape.work("fused", low.dtype, 0, 2 * graph.written_bytes)
