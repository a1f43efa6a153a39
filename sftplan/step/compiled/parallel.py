"""The backward pass of a compiled block whose MLP and attention are parallel: NeoX.

Inductor's scheduler takes first what grows memory least (torch/_inductor/memory.py, topological_sort_lpmf),
so that the order goes with how activations compare with weights: by tokens over the hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.compiled.backward import Backward
from sftplan.step.compiled.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.step.compiled.block import Block
    from sftplan.step.compiled.graph import Buffer

# Tokens over the hidden size in allocator traces of pythia-410m (torch 2.11, 2026-11-27): 4, 2 and 1.
LONG, SHORT = 4, 1


def parallel_backward_graph(block: Block, saved: Mapping[str, Buffer]) -> Graph:
    """Births and deaths of the backward pass, which begins with what was saved and ends with gradients."""
    backward = _Parallel(block, Graph(held=dict(saved)))
    ratio = block.tokens / block.model.hidden_size
    if not block.widens:
        backward.unwidened()
    elif ratio >= LONG:
        backward.long()
    elif ratio > SHORT:
        backward.middle()
    else:
        backward.short()
    return backward.graph


class _Parallel(Backward):
    """The orders; all but `unwidened` are of weights in fp32, whose gradients are widened."""

    def unwidened(self) -> None:
        """Weights' gradients that can be taken, then attention, then the MLP."""
        if self.block.dropout:
            self._enter()
        self._taken("projected", "attended by token")
        self._taken("down", "act")
        self.inward("projected", "d attended")
        self.attended()
        self._through_heads()
        self._taken("qkv", "norm1")
        self.inward("qkv", "d norm1")
        self.graph.free("d qkv")
        self._through_activation()
        self.graph.free("d out low")
        self._taken("pre", "norm2")
        self.inward("pre", "d norm2")
        self.graph.free("d act")
        self._first_norm()

    def long(self) -> None:
        """Activations are larger than weights: what frees most of them comes first."""
        self._enter()
        self._taken("projected", "attended by token", widen=False)
        self._taken("down", "act", widen=False)
        self.widen("projected")
        self.inward("projected", "d attended")
        self.attended()
        self.widen("down")
        self._through_activation()
        self._by_head()
        self.graph.free("d out low")
        self.inward("pre", "d norm2")
        self._taken("pre", "norm2", "d act", widen=False)
        self._in_order()
        self._taken("qkv", "norm1", widen=False)
        self.inward("qkv", "d norm1")
        self.graph.free("d qkv")
        self._first_norm()
        self.widen("qkv", "pre")

    def middle(self) -> None:
        """The MLP before the attention's input."""
        self._enter()
        self._taken("projected", "attended by token", widen=False)
        self.inward("projected", "d attended")
        self.widen("projected")
        self._taken("down", "act", widen=False)
        self.attended()
        self._through_activation()
        self.inward("pre", "d norm2")
        self._taken("pre", "norm2", "d act", widen=False)
        self.widen("down", "pre")
        self._through_heads()
        self.inward("qkv", "d norm1")
        self._taken("qkv", "norm1", "d qkv", widen=False)
        self._first_norm()
        self.graph.free("d out low")
        self.widen("qkv")

    def short(self) -> None:
        """Weights are larger: gradients of all inputs first."""
        self._enter()
        self.inward("projected", "d attended")
        self.attended()
        self._through_heads()
        self.inward("qkv", "d norm1")
        self._through_activation()
        self.inward("pre", "d norm2")
        self._taken("projected", "attended by token")
        self._first_norm()
        self._taken("qkv", "norm1", "d qkv", widen=False)
        self._taken("down", "act", "d out low", widen=False)
        self._taken("pre", "norm2", "d act", widen=False)
        self.widen("qkv", "down", "pre")

    def _enter(self) -> None:
        self.new("d out low", self.block.model.hidden_size)

    def _taken(self, result: str, *read: str, widen: bool = True) -> None:
        """A weight's gradient, after which what it is formed from is not needed."""
        self.weight_gradient(result)
        self.graph.free(*read)
        if widen:
            self.widen(result)

    def _through_activation(self) -> None:
        self.new("d act", self.block.model.intermediate_size)
        self.graph.free(f"cast {self.linear['down'][0]}", "pre")

    def _through_heads(self) -> None:
        self._by_head()
        self._in_order()

    def _by_head(self) -> None:
        self.new("d qkv by head", self.linear["qkv"][2])
        self.graph.free("d q", "d k", "d v")

    def _in_order(self) -> None:
        self.new("d qkv", self.linear["qkv"][2])
        self.graph.free("d qkv by head")

    def _first_norm(self) -> None:
        self.small()
        self.norm("norm1", "d in", ["d norm1", "d norm2"])
