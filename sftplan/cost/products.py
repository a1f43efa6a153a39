"""Seconds of matrix products and attention on a GPU: tiles in waves, and scores at a rate.

Constants from CUDA-event medians over 1,188 products and 640 attentions on one H200 (driver 580.159.04,
torch 2.11+cu130, 2026-11-23; tests/bench/h200_kernels.py), 2.6 µs that two events take subtracted.
"""

from __future__ import annotations

from functools import lru_cache

from sftplan.step.ops.matmul import ALIGNMENT_ELEMENTS

MULTIPROCESSORS = (
    132  # of an H100 or H200; other chips' waves are approximated by as many, slower ones
)
TILES = (
    (128, 256), (256, 128), (192, 192), (128, 128), (320, 128), (128, 160), (128, 192), (64, 256),
    (64, 128), (128, 64), (64, 64),
)  # fmt: skip  # of cuBLAS 13's kernels, as profiles name them
SPLITS = (1, 2, 4, 8)  # of the inner dimension, where tiles are too few to fill the chip
MIN_SPLIT_DEPTH = 512
SPLIT_S = 1e-6  # adding up the parts of a split product
WAVE_S = 2e-6  # filling and draining the pipeline of one wave
PRODUCT_START_S = 2e-6
# By a column or a few, as the loss in chunks has them: 5 to 8 µs with the gap, for one of 50,257 columns beside the
# others (seven of nine products of 2,048 rows by 768 to 1,280, one H200, torch 2.11, 2026-11-28).
THIN_START_S = 6e-6
PRODUCT_BANDWIDTH_FRACTION = 0.8  # 3.5 of 4.4 TB/s, where a product waits for memory
# Shares of the wave rate of 840 TFLOP/s with 50,257 as columns, inner dimension, or rows: 96.5, 140, 147.
UNALIGNED_COLUMNS, UNALIGNED_INNER, UNALIGNED_ROWS = 0.115, 0.167, 0.175


@lru_cache(maxsize=4096)
def product_s(
    m: int, n: int, k: int, batch: int, size: int, flops_per_s: float, bytes_per_s: float,
    *, clock: float = 1.0,
) -> float:  # fmt: skip
    """Seconds of `batch` products (m, k)·(k, n) of `size`-byte elements.

    start + max(waves·(2·tm·tn·k·SM / rate + wave), bytes / bandwidth), the best of tiles tm x tn and
    of splits of k; mean error 5.7 % in bf16, 5.4 % in fp16, 7.8 % in fp32 over the table. `clock` is how
    much faster than for large products alone the GPU runs at that rate, kernels for unaligned sizes do not.

    >>> round(1e6 * product_s(8192, 5120, 1280, 1, 2, 840e12, 4.4e12), 1)  # measured 144.4, addmm 151.4
    149.8
    """
    moved = batch * (m * k + k * n + m * n) * size
    moving_s = moved / (bytes_per_s * PRODUCT_BANDWIDTH_FRACTION)
    if min(m, n, k) < ALIGNMENT_ELEMENTS:
        return THIN_START_S + moving_s
    if size == 2 and (fraction := _unaligned(m, n, k)):
        return PRODUCT_START_S + 2.0 * batch * m * n * k / (flops_per_s / clock * fraction)
    best = float("inf")
    for rows, columns in TILES:
        tiles = batch * -(-m // rows) * -(-n // columns)
        busy = 2.0 * rows * columns * k * MULTIPROCESSORS / flops_per_s
        for split in SPLITS:
            if split > 1 and (k // split < MIN_SPLIT_DEPTH or tiles * split > MULTIPROCESSORS):
                break
            waves = -(-tiles * split // MULTIPROCESSORS)
            seconds = waves * (busy / split + WAVE_S) + (SPLIT_S if split > 1 else 0.0)
            best = min(best, seconds)
    return PRODUCT_START_S + max(best, moving_s)


def _unaligned(m: int, n: int, k: int) -> float:
    """The share of the rate that is left where a dimension is not a multiple of 16 bytes; 0 if all are."""
    if n % ALIGNMENT_ELEMENTS:
        return UNALIGNED_COLUMNS
    if k % ALIGNMENT_ELEMENTS:
        return UNALIGNED_INNER
    return UNALIGNED_ROWS if m % ALIGNMENT_ELEMENTS else 0.0


class AttentionRate:
    """Seconds of one attention kernel: start + elements·a + scores·(b + c·D + dropout), a to c in ps.

    Scores are heads·rows·columns at the full convention (causal kernels skip half: in the rates);
    elements heads·rows·D. D is padded to 64 or to a multiple of 128.
    """

    __slots__ = ("dropout", "element", "per_dim", "score", "start_s")

    def __init__(
        self, start_s: float, element: float, score: float, per_dim: float, dropout: float
    ) -> None:
        self.start_s = start_s
        self.element = element * 1e-12
        self.score = score * 1e-12
        self.per_dim = per_dim * 1e-12
        self.dropout = dropout * 1e-12

    def seconds(
        self, heads: int, rows: int, head_dim: int, columns: float, *, dropout: bool
    ) -> float:
        """Seconds on the H200 that it was measured on."""
        padded = 64 if head_dim <= 64 else -(-head_dim // 128) * 128
        per_score = self.score + self.per_dim * padded + (self.dropout if dropout else 0.0)
        return self.start_s + heads * rows * (self.element * head_dim + per_score * columns)


# Least squares over heads 16-320, T 256-4096, D 64-128, with and without dropout; mean error 8 % and 11 %.
CUDNN = (
    AttentionRate(7e-6, 1.35, 0.164, 0.00208, 0.50),
    AttentionRate(17e-6, 8.2, 0.372, 0.00594, 0.35),
)
FLASH = (
    AttentionRate(9e-6, 2.3, 0.125, 0.00548, 0.19),
    AttentionRate(20e-6, 7.6, 0.334, 0.0152, 0.29),
)
# The memory-efficient kernel in fp32, and what PyTorch takes in bf16 where a mask is given (two sizes each).
EFFICIENT_FP32 = (
    AttentionRate(80e-6, 0, 1.62, 0.0444, 1.8),
    AttentionRate(130e-6, 0, 0.0, 0.18, 2.9),
)
MASKED = (AttentionRate(7e-6, 0, 0.50, 0.0102, 1.8), AttentionRate(17e-6, 0, 0.32, 0.0377, 2.9))
# FlashAttention 2 by documents, its backward with the kernels around it. Scores are those of whole tiles at or
# below the diagonals; heads are padded as above. Least squares over every other two of the 20 packed steps of
# tests/published/h200_compiled_kernels.csv (one H200, torch 2.11, 2026-11-24): mean error of the other ones 3.9 %
# and 5.8 %. Last, seconds of a program of one head that finds no rows.
VARLEN = (
    AttentionRate(12.4e-6, 3.71, 0.915, 0.00577, 0.0),
    AttentionRate(27.8e-6, 1.17, 1.11, 0.0351, 0.0),
)
VARLEN_IDLE_S = (0.45e-9, 8.05e-9)
