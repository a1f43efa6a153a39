"""The backward pass of a compiled block of GPT-2 with dropout and 16-bit weights.

In the order in which an H200 allocated it (torch 2.11; gpt2-medium, 12 rows of 1,024, 2026-11-28).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.compiled.backward import Backward
from sftplan.step.compiled.graph import Graph
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.step.compiled.block import Block
    from sftplan.step.compiled.graph import Buffer

# A norm's backward kernel leaves a row of sums for so many tokens: inductor's mixed-order reduction is no finer.
TOKENS_PER_PARTIAL_SUM = 16


def gpt2_backward_graph(block: Block, saved: Mapping[str, Buffer]) -> Graph:
    """Births and deaths of the backward pass, which begins with what was saved and ends with gradients."""
    backward = _Gpt2(block, Graph(held=dict(saved)))
    backward.mlp()
    backward.second_norm()
    backward.attention()
    backward.first_norm()
    return backward.graph


class _Gpt2(Backward):
    """Weights' gradients come before those of what the weights are multiplied with."""

    def mlp(self) -> None:
        """Down to the gradient of the second norm's result."""
        graph = self.graph
        self.new("d out low", self.block.model.hidden_size)
        graph.free("mask2")
        self.weight_gradient("down")
        graph.free("act")
        self.inward("down", "d act")
        graph.free("d out low", "pre")
        self.weight_gradient("pre")
        graph.free("norm2")
        self.inward("pre", "d norm2 a")
        graph.free("d act")

    def second_norm(self) -> None:
        """Both norms leave their sums in one buffer."""
        block, graph, d = self.block, self.graph, self.block.model.hidden_size
        self.new("d x", d)
        self.new("d projected", d)
        rows = -(-block.tokens // TOKENS_PER_PARTIAL_SUM)
        graph.new("partial sums", rows, 2, d, dtype=DType.FP32)
        graph.free("projected", "norm2.mean", "norm2.rstd")

    def attention(self) -> None:
        """From the output projection down to the gradient of the first norm's result, over that of the values."""
        graph, m = self.graph, self.block.model
        self.weight_gradient("projected")
        graph.reuse("d norm2 a", "d attended")
        graph.free("d projected")
        self.attended()
        self.new("d qkv", m.query_size + 2 * m.kv_size)
        graph.free("d q", "d k")
        self.weight_gradient("qkv")
        graph.free("norm1", "d qkv", "partial sums", "d v")
