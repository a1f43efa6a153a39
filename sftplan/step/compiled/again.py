"""A compiled block under checkpointing: the forward pass forgets, the backward pass computes again.

Both are one graph each, in which a buffer dies when it is read for the last time. Selective checkpointing keeps
what products and the attention give, full checkpointing nothing but the block's input. Orders are those of
inductor's wrapper code (torch 2.13 on fake CUDA tensors; of Qwen3 and GPT-2 also as an H100 allocated, torch 2.11).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.step.compiled.planned import PlannedGraph
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.step.compiled.block import Block


class Again:
    """The steps of both passes. `kept` outlives the forward pass, or is what the backward pass begins with."""

    def __init__(self, block: Block, kept: frozenset[str]) -> None:
        self.block, self.kept = block, kept
        self.graph = PlannedGraph()
        self.model, self.low = block.model, block.low

    def new(self, name: str, columns: int, dtype: DType | None = None) -> None:
        """A result with a row for each token, unless it is there."""
        if name not in self.graph.held:
            self.graph.new(name, self.block.tokens, columns, dtype=dtype or self.low)

    def over(self, old: str, name: str, columns: int, dtype: DType | None = None) -> None:
        """The same over an input that dies, if both are as large."""
        kind = dtype or self.low
        alike = self.graph.held[old].nbytes == self.block.tokens * columns * kind.size
        self.forget(old if alike else "")
        self.new(name, columns, kind)
        self.forget("" if alike else old)

    def forget(self, *names: str) -> None:
        """What is read no more, and not kept."""
        self.graph.free(*(name for name in names if name not in self.kept))

    def cast(self, result: str) -> str:
        """The low copy of a product's weight, under autocast; its name."""
        weight, rows, columns = self.block.linear[result]
        name = f"cast {weight}"
        if self.block.widens and name not in self.graph.held:
            self.graph.new(name, rows, columns, dtype=self.low)
        return name

    def product(self, result: str) -> None:
        """A linear layer, if its result is not there."""
        if result not in self.graph.held:
            self.cast(result)
            self.new(result, self.block.linear[result][2])

    def attended(self) -> None:
        """What the attention's operator returns."""
        graph, m, n = self.graph, self.model, self.block.tokens
        if "attended" not in graph.held:
            graph.give("attended", n, m.query_size, dtype=self.low)
            graph.give("logsumexp", m.num_heads, n, dtype=DType.FP32)
            graph.give("attention.rng", 2, dtype=DType.INT64)

    def queries(self) -> None:
        """Queries and keys as the attention reads them, of the product of all three; OPT's are scaled queries."""
        m = self.model
        if m.family is Family.GPT2:
            return
        self.new("q read", m.query_size)
        if m.family is not Family.OPT:
            self.new("k read", m.kv_size)


def forgetful_forward(block: Block, kept: frozenset[str]) -> PlannedGraph:
    """Births and deaths of the forward pass; at its end live the result and what is kept."""
    run, m, n = Again(block, kept), block.model, block.tokens
    d = m.hidden_size
    run.new("norm1", d)
    if m.parallel_residual:
        run.new("norm2", d)
    sources = ("qkv",) if block.fused_qkv else ("q", "k", "v")
    for part in sources:
        run.product(part)
        run.graph.free(f"cast {block.linear[part][0]}")
    run.graph.free("norm1")
    _read(run, sources)
    run.attended()
    run.graph.free("q read", "k read", "v read")
    run.forget(*sources, "logsumexp", "attention.rng")
    if m.family is Family.NEOX and not block.by_token:
        run.graph.new("attended by token", n, m.query_size, dtype=block.low)
        run.forget("attended")
    _product(run, "projected")
    run.forget("attended")
    run.graph.free("attended by token")
    residual = block.dropout and not m.parallel_residual
    if residual:
        run.over("projected", "residual", d, block.weights)
    if not m.parallel_residual:
        run.new("norm2", d)
    _feed_forward(run)
    last = next((x for x in ("residual", "projected") if x in run.graph.held), "down")
    last = "down" if last in kept or m.parallel_residual else last
    run.graph.over(last, "out", n, d, dtype=block.weights)
    run.graph.free("down")
    run.forget("projected")
    return run.graph


def _product(run: Again, result: str) -> None:
    run.product(result)
    run.graph.free(f"cast {run.block.linear[result][0]}")


def _read(run: Again, sources: tuple[str, ...]) -> None:
    """Rotated, scaled and repeated; what they are made of dies."""
    m = run.model
    if run.block.fused_qkv:
        run.queries()
        return
    for part in sources:
        columns = m.query_size if part == "q" else run.block.attended_kv_size
        scaled = part == "q" or (part == "k" and m.family is not Family.OPT)
        if scaled or run.block.repeats:
            run.new(f"{part} read", columns)
            run.forget(part)


def _feed_forward(run: Again) -> None:
    block, inner = run.block, run.model.intermediate_size
    first = "act" if block.relu else "pre"
    _product(run, first)
    if "up" in block.linear:
        _product(run, "up")
    run.graph.free("norm2")
    if block.relu:
        run.over("act", "activated", inner)
    else:
        run.over("pre", "activated", inner)
        run.forget("up")
    _product(run, "down")
    run.graph.free("activated")


def kept_by(block: Block, given: frozenset[str]) -> frozenset[str]:
    """Of what products and the attention give, what this block has and its backward pass reads."""
    here = {"attended", "logsumexp", "attention.rng", *block.linear} - {"down"}
    unread = {"projected"} if block.model.parallel_residual else set()
    return frozenset((here & given) - unread)
