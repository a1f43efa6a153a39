"""The backward pass of a compiled block under checkpointing, which computes again what it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.step.compiled.again import Again

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.step.compiled.block import Block
    from sftplan.step.compiled.graph import Buffer
    from sftplan.step.compiled.planned import PlannedGraph


def recomputing_backward(block: Block, held: Mapping[str, Buffer]) -> PlannedGraph:
    """Births and deaths of the backward pass, which begins with what was kept and ends with gradients."""
    backward = _Backward(block, frozenset())
    backward.graph.held |= held
    if block.model.parallel_residual:
        backward.parallel()
    else:
        backward.whole = "pre" not in held and "act" not in held
        backward.mlp()
        backward.attention()
        backward.end()
    return backward.graph


class _Backward(Again):
    """Stretch by stretch. `whole`: nothing was kept, so all is computed before the first gradient."""

    whole = True

    def inward(self, result: str, name: str) -> None:
        """The gradient of a product's input."""
        weight = self.cast(result)
        self.new(name, self.block.linear[result][1])
        self.graph.free(weight)

    def weight_gradient(self, *results: str) -> None:
        """In the weight's type."""
        for weight, rows, columns in (self.block.linear[result] for result in results):
            if self.block.widens:
                self.graph.new(f"{weight} low", rows, columns, dtype=self.low)
                self.graph.over(
                    f"{weight} low", f"{weight}.grad", rows, columns, dtype=self.block.weights
                )
            else:
                self.graph.new(f"{weight}.grad", rows, columns, dtype=self.low)

    def mlp(self) -> None:
        """Down to the gradient of the first addition's result."""
        block, graph, d = self.block, self.graph, self.model.hidden_size
        if block.widens or block.dropout:
            self.new("d out low", d)
        if block.gated:
            if self.whole:
                self.forward_again()
            self.inward("down", "d act")
        else:
            self.inward("down", "d act")
            if self.whole:
                self.forward_again()
        inner = "act" if block.relu else "pre"
        if block.relu:  # over what enters it, which nothing else reads
            self.over("act", "activated", self.model.intermediate_size)
        else:
            self.new("activated", self.model.intermediate_size)
        if block.gated:
            self.new("d pre", block.linear["pre"][2])
            if "up" in block.linear:
                self.new("d up", block.linear["up"][2])
            graph.free(inner, "up", "d act")
        else:
            self.over("d act", "d pre", self.model.intermediate_size)
            graph.free(inner)
        self.weight_gradient("down")
        graph.free("activated")
        self.inner_products(inner)

    def inner_products(self, inner: str) -> None:
        """Through the products that enter the activation, and the second norm."""
        block, graph, d = self.block, self.graph, self.model.hidden_size
        up = "up" in block.linear
        if self.whole and up:
            self.weight_gradient("up")
            self.inward("up", "d norm2 b")
            graph.free("d up")
            self.weight_gradient(inner)
            graph.free("norm2", "d out low")
            self.inward(inner, "d norm2 a")
            graph.free("d pre")
        elif self.whole:
            graph.free("d out low")
            self.inward(inner, "d norm2 a")
            self.weight_gradient(inner)
            graph.free("d pre", "norm2")
        else:
            graph.free("d out low")
            self.inward(inner, "d norm2 a")
            if up:
                self.inward("up", "d norm2 b")
            self.new("norm2", d)
        self.new("d x", d, block.weights)
        if block.dropout or block.widens:
            self.new("d projected", d)
        if not self.whole:
            self.weight_gradient(inner, *(["up"] if up else []))
            graph.free("norm2", "d pre", "d up")
        if self.block.as_allocated:
            graph.free("projected" if self.whole else "", "d norm2 a")

    def forward_again(self) -> None:
        """Up to what enters the activation, and what the attention's gradient reads."""
        m, block, graph = self.model, self.block, self.graph
        self.new("norm1", m.hidden_size)
        for part in ("qkv",) if block.fused_qkv else ("q", "k", "v"):
            self.product(part)
        self.read_again()
        self.attended()
        graph.free("q first", "v first")
        self.product("projected")
        self.new("norm2", m.hidden_size)
        self.product("act" if block.relu else "pre")
        if "up" in block.linear:
            self.product("up")

    def read_again(self) -> None:
        """Queries, keys and values twice where the attention runs: for both of its passes."""
        m, graph = self.model, self.graph
        if m.family is Family.GPT2 or (m.family is Family.OPT and not self.whole):
            return
        if self.block.fused_qkv or m.family is Family.OPT:
            self.queries()
            graph.free("q" if m.family is Family.OPT else "")
            return
        if self.whole:
            self.new("q first", m.query_size)
        self.new("q read", m.query_size)
        graph.free("" if m.qk_norm else "q")
        self.new("k read", self.block.attended_kv_size)
        graph.free("" if m.qk_norm else "k")
        if self.block.repeats:
            if self.whole:
                self.new("v first", self.block.attended_kv_size)
            self.new("v read", self.block.attended_kv_size)
            graph.free("v")

    def attention(self) -> None:
        """Through the output projection and the attention, to the gradient of the first norm's result."""
        block, graph, m = self.block, self.graph, self.model
        if self.block.as_allocated and not self.whole:
            graph.over("projected", "d attended", block.tokens, m.query_size, dtype=self.low)
        self.inward("projected", "d attended")
        if not self.whole:
            if not block.fused_qkv:
                self.new("norm1", m.hidden_size)
            self.read_again()
        if block.fused_qkv:
            self.weight_gradient("projected")
            graph.free("d projected")
        self.attention_gradients()
        graph.free("qkv" if self.block.as_allocated else "")
        graph.free("d attended", "q read", "k read", "v read", "logsumexp", "attention.rng")
        if block.fused_qkv:
            graph.free("attended", "qkv")
            self.new("d qkv", m.query_size + 2 * m.kv_size)
            graph.free("d q", "d k")
            self.over("d v", "d norm1 q", m.hidden_size)
            graph.free(self.cast("qkv"))
            self.new("norm1", m.hidden_size)
            self.weight_gradient("qkv")
            graph.free("norm1" if self.block.as_allocated else "", "d qkv")
        else:
            self.three()

    def attention_gradients(self) -> None:
        """What the attention's backward operator returns."""
        n, m, size = self.block.tokens, self.model, self.block.attended_kv_size
        for part, columns in (("d q", m.query_size), ("d k", size), ("d v", size)):
            self.graph.give(part, n, columns, dtype=self.low)

    def three(self) -> None:
        """Queries, keys and values of products of their own; their weights' gradients come last."""
        graph, m, block = self.graph, self.model, self.block
        if block.repeats:
            self.new("d v summed", m.kv_size)
            graph.free("d v")
        self.inward("v", "d norm1 v")
        for part, size in (("k", m.kv_size), ("q", m.query_size)):
            self.new(f"d {part}.raw", size)
            graph.free(f"d {part}", part)
            self.inward(part, f"d norm1 {part}")
        self.weight_gradient("projected")
        graph.free("attended", "projected", "d norm2 a", "d norm2 b", "d projected")
        for part in "vkq":
            self.weight_gradient(part)
            graph.free(f"d {part}.raw", f"d {part} summed", f"d {part}")
        graph.free("norm1", "v", "k")

    def end(self) -> None:
        """The gradient of the block's input, over that of the first addition."""
        graph, d = self.graph, self.model.hidden_size
        graph.new("biases and norms", self.block.num_small(), dtype=self.block.weights)
        self.over("d x", "d in", d, self.block.weights)
        graph.free(*(f"d norm1 {part}" for part in "qkv"))
        graph.free("norm1", "norm2", "projected", "d norm2 a", "d norm2 b", "d projected")

    def parallel(self) -> None:
        """NeoX: the MLP, then the attention, both from norms of the same input."""
        block, graph, m = self.block, self.graph, self.model
        if block.widens or block.dropout:
            self.new("d out low", m.hidden_size)
        self.inward("down", "d act")
        whole = "pre" not in graph.held
        if whole:
            for name in ("norm2", "norm1"):
                self.new(name, m.hidden_size)
            self.product("pre")
        self.new("activated", m.intermediate_size)
        self.over("d act", "d pre", m.intermediate_size)
        graph.free("pre")
        self.weight_gradient("down")
        graph.free("activated")
        self.inward("pre", "d norm2")
        if whole:
            self.weight_gradient("pre")
            graph.free("d pre", "norm2")
        self.inward("projected", "d attended")
        self.product("qkv")
        self.queries()
        self.attended()
        self.attention_gradients()
        graph.free("d attended", "q read", "k read", "logsumexp", "attention.rng")
        self.over("qkv", "d qkv by head", block.linear["qkv"][2])
        graph.free("d q", "d k")
        self.new("d qkv", block.linear["qkv"][2])
        graph.free("d qkv by head")
        self.over("d v", "d norm1", m.hidden_size)
        graph.free(self.cast("qkv"))
        for name in () if whole else ("norm2", "norm1"):
            self.new(name, m.hidden_size)
        self.new("d in", m.hidden_size, block.weights)
        if not whole:
            self.weight_gradient("pre")
            graph.free("d pre", "norm2")
        graph.free("d norm1", "d norm2")
        graph.new("attended by token", block.tokens, m.query_size, dtype=self.low)
        graph.free("attended")
        self.weight_gradient("projected")
        graph.free("attended by token", "d out low")
        self.weight_gradient("qkv")
        graph.free("norm1", "d qkv", "projected")
        graph.new("biases and norms", block.num_small(), dtype=block.weights)
