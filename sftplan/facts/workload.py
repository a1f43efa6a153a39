"""How much work there is: the rows, tokens and examples of a run."""

from __future__ import annotations

from dataclasses import dataclass


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
    padded_mean_tokens: (
        float  # mean tokens per example when rows are padded to the longest of a micro-batch
    )
    packed_fill_fraction: float  # share of a packed row that holds tokens
    estimated: bool
    tokenizer: str
    num_cut: int = 0  # examples whose prompt's beginning or early turns were cut
    response_max_tokens: int = 0
    num_packed_rows: int = 0
    padded_means: tuple[tuple[int, float], ...] = ()  # (micro-batch, padded mean tokens)
    histogram: tuple[tuple[int, int], ...] = ()  # (upper edge in tokens, examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Rows of at most `seq_len` tokens; `global_batch` examples per step unless rows are pinned."""

    seq_len: int
    global_batch: int
    global_batch_pinned: bool = False
    epochs: float = 1.0
    num_examples: int | None = None
    num_tokens: int | None = None
    lengths: LengthStatistics | None = None

    @property
    def response_fraction(self) -> float | None:
        """Share of the tokens that are trained on; None without data."""
        if self.lengths is None:
            return None
        return self.lengths.response_mean_tokens / self.lengths.total_mean_tokens
