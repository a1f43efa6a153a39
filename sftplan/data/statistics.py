"""Statistics of the lengths of examples: means, percentiles, packing, targets, histogram."""

from __future__ import annotations

import itertools
import math
import operator
from typing import TYPE_CHECKING

from sftplan.data.batches import shuffled
from sftplan.data.pack import fill_fraction, pack
from sftplan.data.store import counts
from sftplan.facts.workload import LengthStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.fit import Fitted

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows whose targets are counted together in `target_maxima`."""

HISTOGRAM_BINS = 16


def length_statistics(
    fitted: Fitted,
    *,
    source: str,
    tokenizer: str,
    estimated: bool,
    num_skipped: int = 0,
) -> LengthStatistics:
    """Statistics of the examples of a data file, cut to the sequence length.

    Args:
        fitted: The examples after cutting.
        source: The file or folder.
        tokenizer: Where the tokenizer is from.
        estimated: Whether tokens are estimated from characters.
        num_skipped: Bad examples that were skipped; they count as dropped.
    """
    examples = fitted.examples
    total, response = counts(examples)
    n = len(examples)
    ordered = sorted(total)
    rows = pack(total, fitted.seq_len)
    return LengthStatistics(
        source=source,
        num_examples=n,
        num_dropped=len(fitted.dropped) + num_skipped,
        prompt_mean_tokens=(sum(total) - sum(response)) / n,
        response_mean_tokens=sum(response) / n,
        total_mean_tokens=sum(total) / n,
        total_max_tokens=ordered[-1],
        total_p50_tokens=percentile(ordered, 0.50),
        total_p95_tokens=percentile(ordered, 0.95),
        packed_fill_fraction=fill_fraction(total, len(rows), fitted.seq_len),
        estimated=estimated,
        tokenizer=tokenizer,
        num_cut=fitted.num_cut,
        response_max_tokens=max(response),
        num_packed_rows=len(rows),
        target_maxima=target_maxima(response),
        histogram=histogram(total),
    )


def percentile(ordered: Sequence[int], fraction: float) -> int:
    """The smallest value that at least `fraction` of the values do not exceed.

    >>> percentile([1, 2, 3, 4], 0.5), percentile([1, 2, 3, 4], 0.95)
    (2, 4)
    """
    return ordered[max(math.ceil(fraction * len(ordered)) - 1, 0)]


def target_maxima(trained: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(rows, most trained tokens in so many that follow each other), a row being one example.

    The order is that of the first epoch of the default seed. Rows that begin anywhere stand for
    other epochs, whose micro-batches are other ones.

    >>> target_maxima([4, 4, 4])[:3]
    ((1, 4), (2, 8), (4, 12))
    """
    order = shuffled(len(trained), 0, 0)
    sums = list(itertools.accumulate((trained[index] for index in order), initial=0))
    return tuple(
        (size, max(map(operator.sub, sums[size:] or sums[-1:], sums))) for size in MICRO_BATCHES
    )


def histogram(lengths: Sequence[int], bins: int = HISTOGRAM_BINS) -> tuple[tuple[int, int], ...]:
    """(upper edge in tokens, examples up to it and above the edge before), equal widths.

    >>> histogram([1, 2, 3, 10], bins=2)
    ((5, 3), (10, 1))
    """
    width = max(-(-max(lengths) // bins), 1)
    counts = [0] * (-(-max(lengths) // width))
    for length in lengths:
        counts[(length - 1) // width] += 1
    return tuple(((i + 1) * width, count) for i, count in enumerate(counts))
