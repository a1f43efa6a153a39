"""The LM head and its loss as one compiled function."""

from __future__ import annotations

from sftplan.step.compiled.graph import Buffer, Compiled, Graph
from sftplan.step.ops.matmul import ALIGNMENT_ELEMENTS
from sftplan.step.tensor import DType

# Elements of 128 bytes: what other heads are padded to, and inductor's long rows (config.comprehensive_padding).
HEAD_MULTIPLE = 64


def head_columns(vocab_size: int) -> int:
    """Columns of the head's product in our own losses.

    50,257 run at an eighth of the speed of 50,304, 50,272 at the same (one H200, torch 2.11).

    >>> head_columns(50257), head_columns(50272), head_columns(128256)
    (50304, 50272, 128256)
    """
    return vocab_size if vocab_size % ALIGNMENT_ELEMENTS == 0 else _apart(vocab_size)


def _apart(columns: int) -> int:
    """How many elements apart rows begin that are not packed."""
    return -(-columns // HEAD_MULTIPLE) * HEAD_MULTIPLE


def column_parts(vocab_size: int) -> tuple[int, ...]:
    """Columns that are multiplied together without padding: as many as are aligned, then the few that are left.

    >>> column_parts(50257), column_parts(50272)
    ((50256, 1), (50272,))
    """
    left = vocab_size % ALIGNMENT_ELEMENTS
    return tuple(part for part in (vocab_size - left, left) if part)


def compiled_head(
    vocab_size: int,
    hidden_size: int,
    positions: int,
    *,
    weights: DType = DType.FP32,
    autocast: DType | None = DType.BF16,
) -> Compiled:
    """F.linear(h, padded W).float() and cross-entropy over `positions` rows, compiled together.

    The logits exist once, in the low type, in rows that inductor begins at multiples of HEAD_MULTIPLE; their
    gradient is written over them. Softmax leaves two fp32 numbers per row. The hidden states and the low (or
    padded) weight are kept from forward to backward; the weight's gradient is the padded one's first rows.

    >>> compiled_head(50257, 768, 1024).saved_bytes
    181870596
    >>> compiled_head(32000, 2048, 1024, weights=DType.BF16, autocast=None).saved_bytes
    69738500
    """
    low = autocast or weights
    full, padded = weights is not low, head_columns(vocab_size)
    forward = Graph()
    if full:
        forward.new("hidden low", positions, hidden_size, dtype=low)
    if full or padded != vocab_size:
        forward.new("weight low", padded, hidden_size, dtype=low)
    forward.new("logits", positions, _apart(vocab_size), dtype=low)
    forward.new("maximum", positions, dtype=DType.FP32)
    forward.new("log of sum", positions, dtype=DType.FP32)
    forward.new("loss", dtype=DType.FP32)
    forward.new("kept positions", dtype=DType.FP32)
    held = {name: buffer for name, buffer in forward.held.items() if name != "loss"}
    if not full:
        held = {"hidden low": Buffer("hidden", (positions, hidden_size), low), **held}
    saved = tuple(held.values())
    backward = Graph(held=held)
    backward.free("maximum", "log of sum", "kept positions")
    backward.reuse("logits", "d logits")
    copied = not full and padded != vocab_size
    if copied and positions < hidden_size:  # inductor's order in both such cases that are known
        backward.new("d hidden low", positions, hidden_size, dtype=low)
        backward.free("weight low")
        backward.new("d weight low", padded, hidden_size, dtype=low)
        backward.free("hidden low", "d logits")
    else:
        backward.new("d weight low", padded, hidden_size, dtype=low)
        backward.free("hidden low")
        backward.new("d hidden low", positions, hidden_size, dtype=low)
        backward.free("d logits", "weight low")
    if full:
        backward.new("d weight", vocab_size, hidden_size, dtype=weights)
        backward.free("d weight low")
    if full:
        backward.new("d hidden", positions, hidden_size, dtype=weights)
        backward.free("d hidden low")
    return Compiled(saved, forward, backward)
