"""Seconds of each kernel on a GPU: what it computes and what it moves, at measured shares of the rates.

Shares from CUDA-event medians (tests/bench/h200_membound.py) and from the kernels of five profiled steps on
one H200 (driver 580.159.04, torch 2.11+cu130, transformers 5.17, 2026-11-23); streaming is 4.40 TB/s there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.cost.device import REFERENCE_FP32_FLOPS_PER_S
from sftplan.cost.products import (
    CUDNN,
    EFFICIENT_FP32,
    FLASH,
    MASKED,
    VARLEN,
    VARLEN_IDLE_S,
    product_s,
)
from sftplan.step.ops.attention import FLASH_BLOCK_ROWS
from sftplan.step.tensor import DType
from sftplan.step.work import BROADCAST, MIXED, STRIDED

if TYPE_CHECKING:
    from sftplan.cost.device import Device
    from sftplan.step.work import Work

GAP_S = 1.0e-6  # between kernels of a full queue: a profiled step's length less its kernels, over 3,499 kernels
# Between kernels of a CUDA graph: 0.2 to 0.7 µs in steps of 1,380 to 11,200 kernels (steps of cost/power.py).
GRAPH_GAP_S = 0.4e-6
# Before products with large results cuBLAS clears a counter, which in a graph has a gap before and after it: 1.4 +
# 0.8 + 2.2 to 5.1 µs where there would be 0.4 (profiles of six captured steps, one H200, torch 2.11, 2026-11-28).
# All results of 11.8e6 elements and more had it, none of 6.3e6 and less but those of 12,288 rows of 320; of split
# products none.
GRAPH_RESET_S = 5.0e-6
RESET_ELEMENTS = 10e6
RAMP_S = 1.0e-6  # a kernel that moves next to nothing: profiles show 1.0 to 1.2 µs
SUM_START_S = 6e-6  # sums over rows clear a buffer and pass partial sums through memory

COMPUTE_KINDS = frozenset(
    (
        "linear",
        "bmm",
        "grouped",
        "flash",
        "flash_backward",
        "efficient",
        "efficient_backward",
        "varlen",
        "varlen_backward",
    )
)

# Shares of the streaming bandwidth: in fp32, in a two-byte type.
STREAMING = (1.0, 1.0)  # add, mul, tanh, GELU, SiLU: 4.2 to 4.4 TB/s
MIXED_TYPES = (0.59, 0.59)  # 2.6: bf16 with fp32, not vectorised
INDEXED = (0.55, 0.375)  # 2.4, 1.65: broadcast or strided operands
ACCESS: dict[tuple[int, ...], tuple[float, float]] = {
    MIXED: MIXED_TYPES,
    BROADCAST: INDEXED,
    STRIDED: INDEXED,
}
FRACTIONS: dict[str, tuple[float, float]] = {
    "cast": (0.49, 0.98),  # 2.16 to fp32 (not vectorised), 4.35 to bf16
    "dropout": (0.81, 0.81),  # 3.05 forward, 4.3 backward: their mean
    "by_row": (0.76, 0.76),  # each row less or times a number of its own: 3.1 and 3.7
    "layer_norm": (0.66, 0.45),
    "layer_norm_weight": (0.44, 0.23),
    "sum": (0.50, 0.50),
    "mean": (0.70, 0.70),
    "log_softmax": (0.51, 0.51),  # reads its input twice
    "log_softmax_backward": (0.65, 0.65),
    "softmax": (0.51, 0.51),  # as log_softmax: the same kernels
    "zero": (1.05, 0.75),
    "adamw": (0.80, 0.62),
    "master_adamw": (0.70, 0.70),  # 26 bytes a parameter of gpt2-large in 6.53 ms: 3.08 TB/s
    "norm": (0.75, 0.51),
    "clip": (0.80, 0.80),
    "embedding": (0.25, 0.25),  # rows gathered fast; gradients sorted and summed slowly
    "index": (0.25, 0.25),
    # Inductor's kernels, by what they move (step/blocks/compiled.py), and sums for biases by what they read.
    "fused": (1.0, 1.0),
    # The gradient of the compiled head's logits, written over them: 3.2 TB/s (as below).
    "cross_entropy_backward": (0.73, 0.73),
    # An exact GELU beside what it moves: an element counts as a byte. 50.3e6 take 28 µs more than their bytes going
    # forward, 33 µs going backward (pythia-410m, 6 rows of 2,048; profile on one H200, torch 2.11, 2026-11-28).
    "erf": (0.38, 0.38),
    # Sums of a norm's backward kernel, added up column by column: 384 rows of 1,024 in 8 to 9 µs, 768 in 15 to 23,
    # 768 of 960 in 20 (profiles of 2026-11-28 as above).
    "partial_sums": (0.045, 0.045),
}
# Kernels of the compiled head that are bound by what they compute: while they move a byte, products in fp32 would
# do so many FLOPs. At 52 TFLOP/s an online softmax over 50,000 to 152,000 columns reads 1.1 to 1.5 TB/s, and the
# gradient of columns that are no multiple of 64 is read and written at 1.2 to 1.4 (11 of the steps of
# cost/power.py).
SCALAR_FLOPS_PER_BYTE = {"online_softmax": 40.0, "padded_cross_entropy_backward": 40.0}
STRIDED_FRACTIONS: dict[str, tuple[float, float]] = {"cat": (0.40, 0.40), "copy": (0.45, 0.45)}


def kernel_s(work: Work, device: Device, *, dropout: bool = False, captured: bool = False) -> float:
    """Seconds that a kernel keeps the GPU busy, the gap before it included.

    `dropout`: whether attention drops; `captured`: in a CUDA graph.
    """
    gap_s = GRAPH_GAP_S if captured else GAP_S
    if work.kind not in COMPUTE_KINDS:
        return gap_s + pointwise_s(work, device)
    if not work.kind.startswith(("linear", "bmm", "grouped")):
        return gap_s + attention_s(work, device, dropout=dropout)
    batch, m, n, k = work.shape if len(work.shape) == 4 else (1, *work.shape)
    rate = device.flops_per_s(work.dtype)
    size, moved = work.dtype.size, device.bytes_per_s
    if captured and m * n >= RESET_ELEMENTS:
        gap_s += GRAPH_RESET_S
    return gap_s + product_s(m, n, k, batch, size, rate, moved, clock=device.highest_clock)


def pointwise_s(work: Work, device: Device) -> float:
    """ramp + bytes / (bandwidth · share of the kind)."""
    start = SUM_START_S if work.kind == "sum" else RAMP_S
    if work.kind in SCALAR_FLOPS_PER_BYTE:
        per_byte = SCALAR_FLOPS_PER_BYTE[work.kind] / device.fp32_flops_per_s
        return start + work.nbytes * max(per_byte, 1 / device.bytes_per_s)
    return start + work.nbytes / (device.bytes_per_s * fraction(work))


def fraction(work: Work) -> float:
    """The share of the streaming bandwidth that a kind reaches in its type."""
    shares = FRACTIONS.get(work.kind)
    if shares is None:
        if work.kind in ("cat", "copy"):  # parts differ in shape as a rule: only their order counts
            shares = STRIDED_FRACTIONS[work.kind] if work.shape == STRIDED else STREAMING
        else:
            shares = ACCESS.get(work.shape, STREAMING)
    return shares[0] if work.dtype.size == 4 else shares[1]


def attention_s(work: Work, device: Device, *, dropout: bool) -> float:
    """Scores and elements at the rates of the kernel that PyTorch takes, scaled by the products' rate."""
    full = work.dtype is DType.FP32
    if "varlen" in work.kind:
        heads, rows, head_dim, tiles, idle = work.shape
        backward = "backward" in work.kind
        rate, idle_s = VARLEN[backward], heads * idle * VARLEN_IDLE_S[backward]
        scores = tiles * FLASH_BLOCK_ROWS**2 / rows
        seconds = idle_s + rate.seconds(heads, rows, head_dim, scores, dropout=False)
    else:
        heads, rows, head_dim, columns = work.shape
        if "efficient" in work.kind:
            table = EFFICIENT_FP32 if full else MASKED
        else:
            table = CUDNN if device.has_cudnn_attention and columns == rows else FLASH
        rate = table["backward" in work.kind]
        seconds = rate.seconds(heads, rows, head_dim, columns, dropout=dropout)
    if full:
        return seconds * REFERENCE_FP32_FLOPS_PER_S / device.fp32_flops_per_s
    return seconds * device.attention_scale
