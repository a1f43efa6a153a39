"""How much work there is: the rows, tokens and examples of a run."""

from __future__ import annotations

from dataclasses import dataclass

ROW_MULTIPLE = 64
"""Tokens: rows of such lengths fill the tiles of attention and of matrix products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """Token lengths of a data file, cut to the sequence length.

    `estimated` says that no tokenizer was at hand and tokens were estimated from characters.
    """

    source: str
    num_examples: int
    num_dropped: int
    prompt_mean_tokens: float
    response_mean_tokens: float
    total_mean_tokens: float
    total_max_tokens: int
    total_p50_tokens: int
    total_p95_tokens: int
    packed_fill_fraction: float  # share of a packed row that holds tokens
    estimated: bool
    tokenizer: str
    num_cut: int = 0  # examples whose prompt's beginning or early turns were cut
    response_max_tokens: int = 0
    num_packed_rows: int = 0
    target_maxima: tuple[tuple[int, int], ...] = ()  # (rows, most trained tokens in so many)
    histogram: tuple[tuple[int, int], ...] = ()  # (upper edge in tokens, examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Rows of at most `seq_len` tokens; `global_batch` examples per step unless rows are pinned.

    `train_on_prompt`: every token counts, not only the responses'.
    """

    seq_len: int
    global_batch: int
    global_batch_pinned: bool = False
    epochs: float = 1.0
    num_examples: int | None = None
    num_tokens: int | None = None
    lengths: LengthStatistics | None = None
    train_on_prompt: bool = False

    @property
    def response_fraction(self) -> float | None:
        """Share of the tokens that are trained on; None without data."""
        if self.lengths is None:
            return None
        if self.train_on_prompt:  # all but the first, which nothing stands before
            return 1 - 1 / self.lengths.total_mean_tokens
        return self.lengths.response_mean_tokens / self.lengths.total_mean_tokens

    def row_len(self, *, packing: bool) -> int:
        """Columns of every row: rows of one example are all padded alike, so that shapes stay fixed."""
        if packing or self.lengths is None:
            return self.seq_len
        return padded_row_len(self.lengths.total_max_tokens, self.seq_len)

    def most_targets(self, rows: int) -> int:
        """Trained tokens that a micro-batch of `rows` examples, one a row, has at most.

        A size that was not counted has no more than sizes that were counted have together, and no
        more than the next larger one.
        """
        if self.lengths is None or self.train_on_prompt:
            return rows * self.row_len(packing=False)
        counted = self.lengths.target_maxima or ((1, self.row_len(packing=False)),)
        together, left = 0, rows
        for size, most in reversed(counted):
            times, left = divmod(left, size)
            together += times * most
        return min([together, *[most for size, most in counted if size >= rows][:1]])


def padded_row_len(longest: int, seq_len: int) -> int:
    """Columns that hold the longest example, up to a multiple of ROW_MULTIPLE, at most `seq_len`.

    >>> padded_row_len(670, 1024), padded_row_len(1000, 1000)
    (704, 1000)
    """
    return min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, seq_len)
