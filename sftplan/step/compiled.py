"""What torch.compile keeps and allocates where every block is compiled on its own.

AOTAutograd and inductor of PyTorch 2.13.

The partitioner keeps what a product or the attention needs again, the mean and rstd of norms, and
the sources of what it recomputes; chains of pointwise ops between them leave no tensor behind. So
a block keeps
- its own input, which is the block before's result and is not counted here;
- every linear layer's input, shared by the layers that read it, and under autocast the copy of
  every weight;
- q, k and v as the attention read them, its result and its log-sum-exp; with query and key norms
  also their inputs;
- the output projection's result, from which x + attention(x) is formed again (not where MLP and
  attention are parallel);
- what enters the activation, and up(x) where the MLP is gated; for ReLU only what comes out;
- of dropouts drawn by hash (train/dropout.py) the mask of the MLP's, one byte per element; that of
  the attention's is drawn again, none where both are added at once (NeoX). OPT's are inductor's own,
  whose masks are kept.

tests/unit/test_step_compiled.py has the sizes that inductor's own wrapper code shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.facts.params import parameters
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape

HEAD_MULTIPLE = 64  # columns that the LM head is padded to
SUPPORTED = (Family.GPT2, Family.LLAMA, Family.GEMMA, Family.PHI3, Family.NEOX, Family.OPT)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """One tensor that a compiled graph allocates."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.size


@dataclass(slots=True)
class Graph:
    """Births (True) and deaths (False) in the wrapper code's order; `held` lives at the end."""

    events: list[tuple[bool, Buffer]] = field(default_factory=list)
    held: dict[str, Buffer] = field(default_factory=dict)
    written_bytes: int = 0  # of all that are born

    def new(self, name: str, *shape: int, dtype: DType) -> None:
        """Allocate a buffer."""
        self.held[name] = Buffer(name, shape, dtype)
        self.events.append((True, self.held[name]))
        self.written_bytes += self.held[name].nbytes

    def free(self, *names: str) -> None:
        """Free buffers; those that this block does not have are passed over."""
        for name in names:
            if name in self.held:
                self.events.append((False, self.held.pop(name)))

    def reuse(self, old: str, name: str) -> None:
        """Write a result over a buffer of the same size."""
        self.held[name] = self.held.pop(old)

    def peak_bytes(self) -> int:
        """The most bytes that live at once, against those that lived before."""
        live = peak = 0
        for born, buffer in self.events:
            live += buffer.nbytes if born else -buffer.nbytes
            peak = max(peak, live)
        return peak


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled function: what it keeps for the backward pass, and the events of both passes.

    The backward pass begins with `saved` alive, which it frees, and ends with the gradients
    alive. The gradient
    that comes in is held by the autograd engine all the while and is not among the events.
    """

    saved: tuple[Buffer, ...]
    forward: Graph
    backward: Graph

    @property
    def saved_bytes(self) -> int:
        """Bytes kept between the passes."""
        return sum(x.nbytes for x in self.saved)


def compiled_block(
    model: ModelShape,
    tokens: int,
    *,
    weights: DType = DType.FP32,
    autocast: DType | None = DType.BF16,
    dropout: bool | None = None,
    by_token: bool = False,
    repeats: bool = False,
) -> Compiled:
    """One block over `tokens` tokens, attention by `varlen_attn`.

    `dropout` None is as the model has it.

    `by_token` says that attention gets q and k contiguous as (tokens, heads, d_head): without it
    NeoX's rotated heads lie
    head by head, so does the result, and the output projection needs and keeps a copy. `repeats`
    says that grouped keys and values are copied to every head before the attention, and kept so.

    GPT-2 under autocast with dropout, per token: 31·d bytes, the statistics and the weights' copies

    >>> from sftplan.facts.catalogue import builtin
    >>> gpt2 = compiled_block(builtin("gpt2"), 2048)
    >>> gpt2.saved_bytes
    63045648
    >>> 31 * 2048 * 768 + 2 * 12 * 768**2 + 4 * 2048 * (4 + 12) + 16
    63045648
    >>> [x.name for x in gpt2.saved][:6]
    ['norm1.mean', 'norm1.rstd', 'norm1', 'cast attn.c_attn', 'qkv', 'attended']
    >>> compiled_block(builtin("tinyllama"), 2048, weights=DType.BF16, autocast=None).saved_bytes
    113524752
    """
    if model.family not in SUPPORTED or model.sandwich_norms or model.post_norm:
        message = f"no study of a compiled block of {model.name} ({model.family})"
        raise NotImplementedError(message)
    if dropout is None:
        dropout = model.residual_dropout > 0
    block = _Block(model, tokens, weights, autocast, dropout, by_token, repeats)
    forward = block.forward()
    return Compiled(
        tuple(x for n, x in forward.held.items() if n != "out"), forward, block.backward(forward)
    )


@dataclass(frozen=True, slots=True)
class _Block:
    model: ModelShape
    tokens: int
    weights: DType
    autocast: DType | None
    dropout: bool
    by_token: bool
    repeats: bool

    @property
    def masks(self) -> tuple[str, ...]:
        """The dropouts' masks that are kept: modules are drawn by hash, OPT's functions are not."""
        if not self.dropout:
            return ()
        if self.model.family is Family.OPT:
            return ("mask1", "mask2")
        return () if self.model.parallel_residual else ("mask2",)

    @property
    def attended_kv_size(self) -> int:
        """Columns of keys, and of values, as the attention reads them."""
        return self.model.query_size if self.repeats else self.model.kv_size

    @property
    def low(self) -> DType:
        return self.autocast or self.weights

    @property
    def gated(self) -> bool:
        return self.model.family in (Family.LLAMA, Family.GEMMA, Family.PHI3)

    @property
    def relu(self) -> bool:
        return self.model.activation == "relu"

    @property
    def fused_qkv(self) -> bool:
        return self.model.family in (Family.GPT2, Family.NEOX, Family.PHI3)

    def projections(self) -> list[tuple[str, str, int, int]]:
        """Weight's name, its result's, columns in and out, in the order of the forward pass."""
        m = self.model
        d, f, q, kv = m.hidden_size, m.intermediate_size, m.query_size, m.kv_size
        if m.family is Family.GPT2:
            return [
                ("attn.c_attn", "qkv", d, q + 2 * kv),
                ("attn.c_proj", "projected", q, d),
                ("mlp.c_fc", "pre", d, f),
                ("mlp.c_proj", "down", f, d),
            ]
        if m.family is Family.NEOX:
            return [
                ("query_key_value", "qkv", d, q + 2 * kv),
                ("dense", "projected", q, d),
                ("dense_h_to_4h", "pre", d, f),
                ("dense_4h_to_h", "down", f, d),
            ]
        if m.family is Family.PHI3:
            return [
                ("qkv_proj", "qkv", d, q + 2 * kv),
                ("o_proj", "projected", q, d),
                ("gate_up_proj", "pre", d, 2 * f),
                ("down_proj", "down", f, d),
            ]
        attention = [
            ("q_proj", "q", d, q),
            ("k_proj", "k", d, kv),
            ("v_proj", "v", d, kv),
            ("o_proj", "projected", q, d),
        ]
        if self.gated:
            return [
                *attention,
                ("gate_proj", "pre", d, f),
                ("up_proj", "up", d, f),
                ("down_proj", "down", f, d),
            ]
        return [*attention, ("fc1", "act" if self.relu else "pre", d, f), ("fc2", "down", f, d)]

    # -- forward -----------------------------------------------------------------------------
    def forward(self) -> Graph:
        graph, m, n = Graph(), self.model, self.tokens
        linear = {
            result: (weight, rows, columns) for weight, result, rows, columns in self.projections()
        }

        def product(result: str) -> None:
            weight, rows, columns = linear[result]
            if self.autocast and self.weights is not self.autocast:
                graph.new(f"cast {weight}", rows, columns, dtype=self.low)
            graph.new(result, n, columns, dtype=self.low)

        self._norm(graph, "norm1")
        if m.parallel_residual:
            graph.new("norm2", n, m.hidden_size, dtype=self.low)
        if self.fused_qkv:
            product("qkv")
            if m.family is not Family.GPT2:  # v stays a view of all three
                graph.new("q", n, m.query_size, dtype=self.low)
                graph.new("k", n, m.kv_size, dtype=self.low)
        else:
            for part, heads in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads)):
                product(part)
                if m.qk_norm and part != "v":
                    graph.reuse(part, f"{part}.raw")
                    graph.new(f"{part}.rstd", n, heads, dtype=DType.FP32)
            self._rotate(graph)
        graph.new("attended", n, m.query_size, dtype=self.low)
        graph.new("logsumexp", m.num_heads, n, dtype=DType.FP32)
        graph.new("attention.rng", 2, dtype=DType.INT64)
        if m.family is Family.NEOX and not self.by_token:
            graph.new("attended by token", n, m.query_size, dtype=self.low)
        product("projected")
        if "mask1" in self.masks:
            graph.new("seeds", 2, dtype=DType.INT64)
            graph.new("mask1", n, m.hidden_size, dtype=DType.BYTE)
        if not m.parallel_residual:
            self._norm(graph, "norm2")
        if not self.relu:
            product("pre")
        if "up" in linear:
            product("up")
        if self.relu:
            product("act")
        else:
            graph.new("act", n, m.intermediate_size, dtype=self.low)
        product("down")
        if "mask2" in self.masks:
            graph.new("mask2", n, m.hidden_size, dtype=DType.BYTE)
        if self.weights is self.low:
            graph.reuse("down", "out")
        else:
            graph.new("out", n, m.hidden_size, dtype=self.weights)
        graph.free("down", "seeds")
        if m.parallel_residual:
            graph.free("projected")
        return graph

    def _norm(self, graph: Graph, name: str) -> None:
        if self.model.norm == "layernorm":
            graph.new(f"{name}.mean", self.tokens, dtype=DType.FP32)
        graph.new(f"{name}.rstd", self.tokens, dtype=DType.FP32)
        graph.new(name, self.tokens, self.model.hidden_size, dtype=self.low)

    def _rotate(self, graph: Graph) -> None:
        """Rotated (or scaled) q and k replace their sources, which only a norm of them keeps."""
        for part, size in (("q", self.model.query_size), ("k", self.model.kv_size)):
            if self.model.family is Family.OPT and part == "k":
                continue
            graph.new(f"{part} read", self.tokens, size, dtype=self.low)
            graph.free(part)
            graph.reuse(f"{part} read", part)
        for part in "kv" if self.repeats else "":
            graph.new(f"{part} repeated", self.tokens, self.attended_kv_size, dtype=self.low)
            graph.free(part)

    # -- backward -----------------------------------------------------------------------------
    def backward(self, forward: Graph) -> Graph:
        graph, m, n, low = Graph(), self.model, self.tokens, self.low
        graph.held = {name: buffer for name, buffer in forward.held.items() if name != "out"}
        d = m.hidden_size
        if m.parallel_residual:
            self._parallel_backward(graph)
            return graph
        linear = {
            result: (weight, rows, columns) for weight, result, rows, columns in self.projections()
        }
        full = self.weights is not low

        def inward(result: str, name: str) -> None:
            """The gradient of a product's input."""
            graph.new(name, n, linear[result][1], dtype=low)
            graph.free(f"cast {linear[result][0]}")

        def weight_gradient(result: str) -> None:
            weight, rows, columns = linear[result]
            graph.new(f"{weight} low" if full else f"{weight}.grad", rows, columns, dtype=low)

        def widen(*results: str) -> None:
            if full:
                for weight, rows, columns in (linear[result] for result in results):
                    graph.new(f"{weight}.grad", rows, columns, dtype=self.weights)
                    graph.free(f"{weight} low")

        if full or self.dropout:
            graph.new("d out low", n, d, dtype=low)
            graph.free("mask2")
        if self.gated:  # as inductor's scheduler chose in all cases; the others vary
            weight_gradient("down")
            graph.free("act")
            inward("down", "d act")
            graph.free("d out low")
            if d < n:  # the scheduler takes first what grows memory least
                widen("down")
            graph.new("d pre", n, linear["pre"][2], dtype=low)
            graph.free("pre", "d act")
            if "up" in linear:
                graph.reuse("up", "d up")
            if d >= n:
                widen("down")
            inward("pre", "d norm2 a")
            weight_gradient("pre")
            graph.free("d pre")
            if "up" in linear:
                inward("up", "d norm2 b")
                weight_gradient("up")
            graph.free("d up", "norm2")
            widen("pre", *(["up"] if "up" in linear else []))
        else:
            inward("down", "d act")
            weight_gradient("down")
            graph.free("" if self.relu else "act", "d out low")
            inner = "act" if self.relu else "pre"
            graph.free(inner)
            widen("down")
            inward(inner, "d norm2 a")
            weight_gradient(inner)
            graph.free("norm2", "d act")
            widen(inner)
        late = (
            m.norm == "rmsnorm"
        )  # its weight's gradient is a kernel of its own, after the attention
        self._norm_backward(graph, "norm2", "d x", [] if late else ["d norm2 a", "d norm2 b"])
        graph.free("mask1", "" if late else "projected")
        if full or self.dropout:
            graph.new("d projected", n, d, dtype=low)
        inward("projected", "d attended")
        weight_gradient("projected")
        graph.free("d projected")
        self._attention_backward(graph)
        widen("projected")
        if self.fused_qkv:
            graph.new("d qkv", n, m.query_size + 2 * m.kv_size, dtype=low)
            graph.free("d q", "d k", "d v")
            inward("qkv", "d norm1 q")
            weight_gradient("qkv")
            graph.free("d qkv", "norm1")
            widen("qkv")
        else:
            for part, size in (("k", m.kv_size), ("q", m.query_size)):
                if m.qk_norm and full:
                    graph.new(f"d {part} normed", n, size, dtype=DType.FP32)
                graph.new(f"d {part}.raw", n, size, dtype=low)
                graph.free(f"d {part}", f"d {part} normed", f"{part}.raw", f"{part}.rstd")
            for part, name in (("q", "d q.raw"), ("k", "d k.raw"), ("v", "d v")):
                inward(part, f"d norm1 {part}")
                weight_gradient(part)
                graph.free(name)
            graph.free("norm1")
            widen("q", "k", "v")
        graph.new("biases and norms", self._small(), dtype=self.weights)
        self._norm_backward(
            graph,
            "norm1",
            "d in",
            [f"d norm1 {part}" for part in "qkv"] + ["d norm2 a", "d norm2 b"],
        )
        graph.free("d x", "projected")
        return graph

    def _attention_backward(self, graph: Graph) -> None:
        m, n, size = self.model, self.tokens, self.attended_kv_size
        for part, columns in (("d q", m.query_size), ("d k", size), ("d v", size)):
            graph.new(part, n, columns, dtype=self.low)
        graph.free("d attended", "attended", "logsumexp", "attention.rng", "q", "k", "v", "qkv")
        for part in "kv" if self.repeats else "":
            graph.free(f"{part} repeated")
            graph.new(f"d {part} summed", n, m.kv_size, dtype=self.low)
            graph.free(f"d {part}")
            graph.reuse(f"d {part} summed", f"d {part}")

    def _parallel_backward(self, graph: Graph) -> None:
        """NeoX: weights' gradients that can be taken, then attention, then the MLP."""
        m, n, low, full = self.model, self.tokens, self.low, self.weights is not self.low
        linear = {
            result: (weight, rows, columns) for weight, result, rows, columns in self.projections()
        }

        def weight_gradient(result: str, *read: str) -> None:
            weight, rows, columns = linear[result]
            graph.new(f"{weight} low" if full else f"{weight}.grad", rows, columns, dtype=low)
            graph.free(*read)
            if full:
                graph.new(f"{weight}.grad", rows, columns, dtype=self.weights)
                graph.free(f"{weight} low")

        if full or self.dropout:
            graph.new("d out low", n, m.hidden_size, dtype=low)
            graph.free("mask1", "mask2")
        weight_gradient("projected", "attended by token")
        weight_gradient("down", "act")
        graph.new("d attended", n, m.query_size, dtype=low)
        graph.free(f"cast {linear['projected'][0]}")
        self._attention_backward(graph)
        graph.new("d qkv by head", n, linear["qkv"][2], dtype=low)
        graph.free("d q", "d k", "d v")
        graph.new("d qkv", n, linear["qkv"][2], dtype=low)
        graph.free("d qkv by head")
        weight_gradient("qkv", "norm1")
        graph.new("d norm1", n, m.hidden_size, dtype=low)
        graph.free("d qkv", f"cast {linear['qkv'][0]}")
        graph.new("d act", n, m.intermediate_size, dtype=low)
        graph.free(f"cast {linear['down'][0]}", "pre", "d out low")
        weight_gradient("pre", "norm2")
        graph.new("d norm2", n, m.hidden_size, dtype=low)
        graph.free("d act", f"cast {linear['pre'][0]}")
        graph.new("biases and norms", self._small(), dtype=self.weights)
        self._norm_backward(graph, "norm1", "d in", ["d norm1", "d norm2"])

    def _small(self) -> int:
        """Elements of the biases and of the norms' weights, whose gradients come last here."""
        layer = (x for x in parameters(self.model) if ".0." in x.name)
        return sum(prod(x.shape) for x in layer if len(x.shape) == 1)

    def _norm_backward(self, graph: Graph, name: str, result: str, parts: list[str]) -> None:
        """The gradient of x; it is written over the residual's where there is one."""
        if "d x" in graph.held:
            graph.reuse("d x", result)
        else:
            graph.new(result, self.tokens, self.model.hidden_size, dtype=self.weights)
        graph.free(*parts, f"{name}.mean", f"{name}.rstd")


def compiled_head(
    vocab_size: int,
    hidden_size: int,
    positions: int,
    *,
    weights: DType = DType.FP32,
    autocast: DType | None = DType.BF16,
) -> Compiled:
    """F.linear(h, padded W).float() and cross-entropy over `positions` rows, compiled together.

    The logits exist once, in the low type, and their gradient is written over them; softmax
    leaves two fp32
    numbers per row. The low (or padded) weight is kept from forward to backward.

    >>> compiled_head(50257, 768, 1024).saved_bytes
    181870596
    >>> compiled_head(32000, 2048, 1024, weights=DType.BF16, autocast=None).saved_bytes
    65544196
    """
    low = autocast or weights
    full, padded = weights is not low, -(-vocab_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
    forward = Graph()
    if full:
        forward.new("hidden low", positions, hidden_size, dtype=low)
    if full or padded != vocab_size:
        forward.new("weight low", padded, hidden_size, dtype=low)
    forward.new("logits", positions, padded, dtype=low)
    forward.new("maximum", positions, dtype=DType.FP32)
    forward.new("log of sum", positions, dtype=DType.FP32)
    forward.new("loss", dtype=DType.FP32)
    forward.new("kept positions", dtype=DType.FP32)
    backward = Graph(held={name: buffer for name, buffer in forward.held.items() if name != "loss"})
    saved = tuple(backward.held.values())
    backward.free("maximum", "log of sum", "kept positions")
    backward.reuse("logits", "d logits")
    backward.new("d weight low", padded, hidden_size, dtype=low)
    backward.free("hidden low")
    backward.new("d hidden low", positions, hidden_size, dtype=low)
    backward.free("d logits", "weight low")
    if full or padded != vocab_size:
        backward.new("d weight", vocab_size, hidden_size, dtype=weights)
        backward.free("d weight low")
    if full:
        backward.new("d hidden", positions, hidden_size, dtype=weights)
        backward.free("d hidden low")
    return Compiled(saved, forward, backward)
