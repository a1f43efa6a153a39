"""The forward pass of a compiled block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.step.compiled.graph import Graph
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.step.compiled.block import Block


def forward_graph(block: Block) -> Graph:
    """Births and deaths of the forward pass; what is held at its end is the result and what is kept."""
    graph, m = Graph(), block.model
    _norm(graph, block, "norm1")
    if m.parallel_residual:
        graph.new("norm2", block.tokens, m.hidden_size, dtype=block.low)
    _attend(graph, block)
    _product(graph, block, "projected")
    if block.residual_apart:
        graph.new("residual", block.tokens, m.hidden_size, dtype=block.low)
    if not m.parallel_residual:
        _norm(graph, block, "norm2")
    _mlp(graph, block)
    if block.keeps_mask:
        graph.new("mask2", block.tokens, m.hidden_size, dtype=DType.BYTE)
    if block.residual_apart:
        graph.reuse("residual", "out")
    elif block.widens:
        graph.new("out", block.tokens, m.hidden_size, dtype=block.weights)
    else:
        graph.reuse("down", "out")
    graph.free("down")
    if m.parallel_residual:
        graph.free("projected")
    return graph


def _product(graph: Graph, block: Block, result: str) -> None:
    """A linear layer, under autocast with its weight's copy."""
    weight, rows, columns = block.linear[result]
    if block.autocast and block.weights is not block.autocast:
        graph.new(f"cast {weight}", rows, columns, dtype=block.low)
    graph.new(result, block.tokens, columns, dtype=block.low)


def _attend(graph: Graph, block: Block) -> None:
    """Queries, keys and values as the attention reads them, its result and what it keeps."""
    m, n, low = block.model, block.tokens, block.low
    if block.fused_qkv:
        _product(graph, block, "qkv")
        if m.family is not Family.GPT2:  # v stays a view of all three
            graph.new("q", n, m.query_size, dtype=low)
            graph.new("k", n, m.kv_size, dtype=low)
    else:
        for part, heads in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads)):
            _product(graph, block, part)
            if m.qk_norm and part != "v":
                graph.reuse(part, f"{part}.raw")
                graph.new(f"{part}.rstd", n, heads, dtype=DType.FP32)
        _rotate(graph, block)
    graph.new("attended", n, m.query_size, dtype=low)
    graph.new("logsumexp", m.num_heads, n, dtype=DType.FP32)
    graph.new("attention.rng", 2, dtype=DType.INT64)
    if m.family is Family.NEOX and not block.by_token:
        graph.new("attended by token", n, m.query_size, dtype=low)


def _mlp(graph: Graph, block: Block) -> None:
    """Up to the last product; under ReLU the first one's result is not kept."""
    if block.relu:
        _product(graph, block, "act")
    else:
        _product(graph, block, "pre")
        if "up" in block.linear:
            _product(graph, block, "up")
        graph.new("act", block.tokens, block.model.intermediate_size, dtype=block.low)
    _product(graph, block, "down")


def _norm(graph: Graph, block: Block, name: str) -> None:
    if block.model.norm == "layernorm":
        graph.new(f"{name}.mean", block.tokens, dtype=DType.FP32)
    graph.new(f"{name}.rstd", block.tokens, dtype=DType.FP32)
    graph.new(name, block.tokens, block.model.hidden_size, dtype=block.low)


def _rotate(graph: Graph, block: Block) -> None:
    """Rotated (or scaled) q and k replace their sources, which only a norm of them keeps."""
    for part, size in (("q", block.model.query_size), ("k", block.model.kv_size)):
        if block.model.family is Family.OPT and part == "k":
            continue
        graph.new(f"{part} read", block.tokens, size, dtype=block.low)
        graph.free(part)
        graph.reuse(f"{part} read", part)
    for part in "kv" if block.repeats else "":
        graph.new(f"{part} repeated", block.tokens, block.attended_kv_size, dtype=block.low)
        graph.free(part)
