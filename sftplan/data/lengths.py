"""What the plan asks of a data file: its lengths, and whether its examples are enough.

References:
    [ARTICLE] The analysis that sftplan starts from, §2.1 (E|Q|, E|A|) and §8 (n ≫ d/ε).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.data.cache import default_cache_folder
from sftplan.data.locate import find_tokenizer
from sftplan.data.prepare import prepare
from sftplan.facts.workload import padded_row_len
from sftplan.units import format_count

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.facts.model import ModelShape
    from sftplan.facts.workload import LengthStatistics

EPSILON = 0.1
"""Wanted error in n ≫ d/ε. The article names no figure: this one is our assumption."""

MUCH_GREATER = 10
"""How many times counts as ≫: an order of magnitude, our reading."""


def measure_lengths(
    data: str | Path,
    *,
    model: ModelShape,
    seq_len: int,
    tokenizer: str | Path | None = None,
    skip_bad: int = 0,
) -> LengthStatistics:
    """Length statistics of a file or folder with the model's tokenizer, estimated without one.

    Args:
        data: Instruction data; what is tokenised is kept for the next time.
        model: Whose tokenizer is looked for on this machine, and whose vocabulary holds.
        seq_len: Longest example, in tokens.
        tokenizer: A folder with a tokenizer, instead of the model's.
        skip_bad: How many bad examples may be left out.
    """
    found = find_tokenizer(*tokenizer_names(model), folder=tokenizer)
    return prepare(
        data,
        tokenizer=found,
        seq_len=seq_len,
        skip_bad=skip_bad,
        vocab_size=None if found.estimated else model.vocab_size,
        model=model.name,
        cache=default_cache_folder(),
    ).lengths


def fitting_seq_len(
    data: str | Path,
    *,
    model: ModelShape,
    tokenizer: str | Path | None = None,
    skip_bad: int = 0,
) -> tuple[int, int]:
    """The sequence length that cuts nothing which the model can hold, and the longest example.

    The longest example up to a multiple of ROW_MULTIPLE tokens, at most all of the model's positions.
    """
    longest = measure_lengths(
        data, model=model, seq_len=model.max_positions, tokenizer=tokenizer, skip_bad=skip_bad
    ).total_max_tokens
    return padded_row_len(longest, model.max_positions), longest


def tokenizer_names(model: ModelShape) -> tuple[str, ...]:
    """Under which names a model's tokenizer may lie: its folder, its hub ids."""
    names = (model.source, model.hub_id, model.name)
    return tuple(dict.fromkeys(name for name in names if name))


def generalisation_ratio(
    num_examples: int, num_parameters: int, epsilon: float = EPSILON
) -> tuple[float, str | None]:
    """How n stands to d/ε, and a warning unless n is much greater.

    n·ε/d                                                                  [ARTICLE] §8
    n is the number of examples, d of trainable parameters: an upper bound of the effective ones.

    >>> ratio, warning = generalisation_ratio(4_535, 774_030_080)
    >>> f"{ratio:.1e}"
    '5.9e-07'
    >>> print(warning)
    4,535 examples are few for 774 M parameters: n·ε/d = 5.9e-07, wanted ≫ 1 (ε = 0.1)
    >>> generalisation_ratio(10**9, 10**6)
    (100.0, None)
    """
    ratio = num_examples * epsilon / num_parameters
    if ratio >= MUCH_GREATER:
        return ratio, None
    few = f"{num_examples:,} examples are few for {format_count(num_parameters)} parameters"
    return ratio, f"{few}: n·ε/d = {ratio:.1e}, wanted ≫ 1 (ε = {epsilon:g})"
