"""Rows, tokens and examples of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload


def tokens_per_step(strategy: Strategy, workload: Workload, rows: int) -> float:
    """Real tokens, padding left out.

    Without data every row is full; packed rows are full but for their fill; padded rows hold an
    example each.
    """
    lengths = workload.lengths
    if lengths is None:
        return float(rows * workload.seq_len)
    if strategy.packing:
        return rows * workload.seq_len * lengths.packed_fill_fraction
    return rows * lengths.total_mean_tokens


def examples_per_step(strategy: Strategy, workload: Workload, rows: int) -> float:
    """Examples: one a row, or with packing as many as its tokens make."""
    lengths = workload.lengths
    if lengths is None or not strategy.packing:
        return float(rows)
    return tokens_per_step(strategy, workload, rows) / lengths.total_mean_tokens
