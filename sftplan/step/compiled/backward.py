"""The backward pass of a compiled block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.compiled.graph import Graph
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.step.compiled.block import Block
    from sftplan.step.compiled.graph import Buffer


def backward_graph(block: Block, saved: Mapping[str, Buffer]) -> Graph:
    """Births and deaths of the backward pass, which begins with what was saved and ends with gradients."""
    backward = Backward(block, Graph(held=dict(saved)))
    backward.mlp()
    backward.attention()
    backward.first_norm()
    return backward.graph


class Backward:
    """The graph as it is written, stretch by stretch."""

    def __init__(self, block: Block, graph: Graph) -> None:
        self.block, self.graph = block, graph
        self.linear, self.low = block.linear, block.low
        # The gradient of RMSNorm's weight is a kernel of its own, after the attention.
        self.late = block.model.norm == "rmsnorm"

    def new(self, name: str, columns: int, dtype: DType | None = None) -> None:
        """A result with a row for each token."""
        self.graph.new(name, self.block.tokens, columns, dtype=dtype or self.low)

    def inward(self, result: str, name: str) -> None:
        """The gradient of a product's input."""
        self.new(name, self.linear[result][1])
        self.graph.free(f"cast {self.linear[result][0]}")

    def weight_gradient(self, result: str) -> None:
        """In the type of products, from which it is widened where weights are wider."""
        weight, rows, columns = self.linear[result]
        name = f"{weight} low" if self.block.widens else f"{weight}.grad"
        self.graph.new(name, rows, columns, dtype=self.low)

    def widen(self, *results: str) -> None:
        """Gradients of weights in the weights' type."""
        for weight, rows, columns in (self.linear[r] for r in results if self.block.widens):
            self.graph.new(f"{weight}.grad", rows, columns, dtype=self.block.weights)
            self.graph.free(f"{weight} low")

    def mlp(self) -> None:
        """Down to the norm before it."""
        if self.block.widens or self.block.dropout:
            self.new("d out low", self.block.model.hidden_size)
            self.graph.free("mask2")
        if self.block.gated:
            self._gated()
        else:
            self._plain()
        parts = [] if self.late else ["d norm2 a", "d norm2 b"]
        self.norm("norm2", "d x", parts)

    def _gated(self) -> None:
        """As inductor's scheduler chose in all cases: it takes first what grows memory least."""
        graph, early = self.graph, self.block.model.hidden_size < self.block.tokens
        self.weight_gradient("down")
        graph.free("act")
        self.inward("down", "d act")
        graph.free("d out low")
        if early:
            self.widen("down")
        self.new("d pre", self.linear["pre"][2])
        graph.free("pre", "d act")
        up = ["up"] if "up" in self.linear else []
        if up:
            graph.reuse("up", "d up")
        if not early:
            self.widen("down")
        self.inward("pre", "d norm2 a")
        self.weight_gradient("pre")
        graph.free("d pre")
        for part in up:
            self.inward(part, "d norm2 b")
            self.weight_gradient(part)
        graph.free("d up", "norm2")
        self.widen("pre", *up)

    def _plain(self) -> None:
        graph, inner = self.graph, "act" if self.block.relu else "pre"
        self.inward("down", "d act")
        self.weight_gradient("down")
        graph.free("" if self.block.relu else "act", "d out low")
        graph.free(inner)
        self.widen("down")
        self.inward(inner, "d norm2 a")
        self.weight_gradient(inner)
        graph.free("norm2", "d act")
        self.widen(inner)

    def attention(self) -> None:
        """From the output projection down to the gradient of the first norm's result."""
        graph, m = self.graph, self.block.model
        graph.free("" if self.late else "projected")
        if self.block.widens or self.block.dropout:
            self.new("d projected", m.hidden_size)
        self.inward("projected", "d attended")
        self.weight_gradient("projected")
        graph.free("d projected")
        self.attended()
        self.widen("projected")
        if self.block.fused_qkv:
            self.new("d qkv", m.query_size + 2 * m.kv_size)
            graph.free("d q", "d k", "d v")
            self.inward("qkv", "d norm1 q")
            self.weight_gradient("qkv")
            graph.free("d qkv", "norm1")
            self.widen("qkv")
        else:
            self._three()

    def _three(self) -> None:
        """Queries, keys and values of products of their own."""
        graph, m = self.graph, self.block.model
        for part, size in (("k", m.kv_size), ("q", m.query_size)):
            if m.qk_norm and self.block.widens:
                self.new(f"d {part} normed", size, DType.FP32)
            self.new(f"d {part}.raw", size)
            graph.free(f"d {part}", f"d {part} normed", f"{part}.raw", f"{part}.rstd")
        for part, name in (("q", "d q.raw"), ("k", "d k.raw"), ("v", "d v")):
            self.inward(part, f"d norm1 {part}")
            self.weight_gradient(part)
            graph.free(name)
        graph.free("norm1")
        self.widen("q", "k", "v")

    def first_norm(self) -> None:
        """The gradient of the block's input."""
        self.small()
        parts = [*(f"d norm1 {part}" for part in "qkv"), "d norm2 a", "d norm2 b"]
        self.norm("norm1", "d in", parts)
        self.graph.free("d x", "projected")

    def attended(self) -> None:
        """Through the attention itself; of keys and values that were repeated the sums."""
        graph, m, size = self.graph, self.block.model, self.block.attended_kv_size
        for part, columns in (("d q", m.query_size), ("d k", size), ("d v", size)):
            self.new(part, columns)
        graph.free("d attended", "attended", "logsumexp", "attention.rng", "q", "k", "v", "qkv")
        for part in "kv" if self.block.repeats else "":
            graph.free(f"{part} repeated")
            self.new(f"d {part} summed", m.kv_size)
            graph.free(f"d {part}")
            graph.reuse(f"d {part} summed", f"d {part}")

    def small(self) -> None:
        """Gradients of biases and norms."""
        self.graph.new("biases and norms", self.block.num_small(), dtype=self.block.weights)

    def norm(self, name: str, result: str, parts: list[str]) -> None:
        """The gradient of x; it is written over the residual's where there is one."""
        if "d x" in self.graph.held:
            self.graph.reuse("d x", result)
        else:
            self.new(result, self.block.model.hidden_size, self.block.weights)
        self.graph.free(*parts, f"{name}.mean", f"{name}.rstd")
