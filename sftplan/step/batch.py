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
    """The micro-batch of a run, all of one shape: full rows, packed ones of documents as the data has."""
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
        histogram = () if workload.lengths is None else workload.lengths.histogram
        documents = spread(histogram or ((length, 1),), count, tokens, longest=length)
    return Batch(rows=rows, length=length, num_targets=targets, documents=documents)


def spread(
    histogram: tuple[tuple[int, int], ...], count: int, tokens: int, *, longest: int
) -> tuple[int, ...]:
    """`count` lengths that add up to `tokens`, at even quantiles of a histogram of (upper edge, number).

    Attention grows with the square of a length: documents of the mean one would have too little.

    >>> spread(((100, 2), (300, 1), (500, 1)), 4, 800, longest=512)
    (29, 86, 229, 456)
    >>> spread(((512, 1),), 3, 1536, longest=512)
    (512, 512, 512)
    """
    total = sum(number for _, number in histogram)
    lengths: list[float] = []
    passed, lower = 0, 0
    for upper, number in histogram:
        while (
            len(lengths) < count and (at := (len(lengths) + 0.5) / count * total) <= passed + number
        ):
            lengths.append(lower + (upper - lower) * (at - passed) / number)
        passed, lower = passed + number, upper
    return _scaled(lengths, tokens, longest)


def _scaled(lengths: list[float], tokens: int, longest: int) -> tuple[int, ...]:
    """Whole numbers in the same proportions, none above `longest` while others have room, of the given sum."""
    factor = tokens / sum(lengths)
    found = [max(1, min(longest, round(n * factor))) for n in lengths]
    left = tokens - sum(found)
    for place in sorted(range(len(found)), key=lambda i: -found[i]):
        change = max(1 - found[place], min(longest - found[place], left))
        found[place] += change
        left -= change
    found[-1] += left
    return tuple(found)


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
