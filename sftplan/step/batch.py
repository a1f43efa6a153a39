"""What one forward pass sees: rows, tokens, targets, documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.facts.strategy import Loss, Strategy

if TYPE_CHECKING:
    from sftplan.facts.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch of `rows` × `length` tokens.

    `num_targets` positions reach the LM head; `documents` are the lengths of packed documents, all
    rows together, empty where each row is one.
    """

    rows: int
    length: int
    num_targets: int
    documents: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens with padding."""
        return self.rows * self.length


def full_batch(strategy: Strategy, workload: Workload) -> Batch:
    """The micro-batch of a run, all of one shape: full rows, and of packed ones mean documents."""
    rows, length = strategy.micro_batch, workload.row_len(packing=strategy.packing)
    tokens = rows * length
    targets = tokens
    fraction = workload.response_fraction
    if strategy.loss is not Loss.FULL and fraction is not None:
        targets = (
            target_capacity(tokens, fraction)
            if strategy.packing
            else min(tokens, in_tiles(workload.most_targets(rows)))
        )
    documents: tuple[int, ...] = ()
    if strategy.packing:
        mean = length if workload.lengths is None else workload.lengths.total_mean_tokens
        count = max(rows, round(tokens / mean))
        documents = (tokens // count,) * (count - 1)
        documents += (tokens - sum(documents),)
    return Batch(rows=rows, length=length, num_targets=targets, documents=documents)


TARGET_MULTIPLE = 128  # columns of a matrix product come in tiles of this many
TARGET_HEADROOM_FRACTION = 0.15  # packed rows differ in their share of responses


def target_capacity(num_tokens: int, response_fraction: float) -> int:
    """Places for trained positions in a batch of fixed shape, as training sets them up.

    >>> target_capacity(8192, 0.7)
    6656
    """
    most = math.ceil(num_tokens * response_fraction * (1 + TARGET_HEADROOM_FRACTION))
    return min(num_tokens, in_tiles(most))


def in_tiles(targets: int) -> int:
    """Places for so many targets, up to a multiple of TARGET_MULTIPLE.

    >>> in_tiles(1), in_tiles(256)
    (128, 256)
    """
    return -(-targets // TARGET_MULTIPLE) * TARGET_MULTIPLE
