"""Scaled dot-product attention: the flash kernels, and op by op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.ops.matmul import bmm
from sftplan.step.ops.pointwise import add, dropout, scale, softmax, tanh
from sftplan.step.ops.shape import contiguous, transpose
from sftplan.step.tensor import DType, Tensor

if TYPE_CHECKING:
    from sftplan.step.autograd import Node
    from sftplan.step.tape import Tape

FLASH_BLOCK_ROWS = 128  # sequence rounding of the backward's buffers, flash_api.cpp mha_bwd
CUDNN_EXTRA_BYTES = 256  # of its backward's workspace, seen in an H200's allocator traces
EFFICIENT_ROWS = 32  # log-sum-exp rows are padded to this, attention.cu
MASK_COLUMNS = 16  # an added mask's rows are padded to this, attention.cpp, pad_bias
FLASH_RNG_BYTES = (8, 8)  # seed and offset of the dropout's generator, each a tensor of its own


def attention_flops(batch: int, heads: int, rows: int, columns: int, head_dim: int) -> int:
    """FLOPs of QKᵀ and of the product with V, not halved for causality.

    4·b·a·T²·d_head                                                      [PaLM, appendix B]

    >>> attention_flops(1, 20, 1024, 1024, 64)  # one layer of GPT-2 Large, forward
    5368709120
    """
    return 2 * 2 * batch * heads * rows * columns * head_dim


def rowwise_flops(
    batch: int, heads: int, length: int, head_dim: int, documents: tuple[int, ...]
) -> int:
    """The same of documents that do not see each other; without any, of whole rows.

    4·a·d_head·Σ T²

    >>> rowwise_flops(2, 20, 1024, 64, ()) == 2 * rowwise_flops(1, 20, 1024, 64, (1024,))
    True
    """
    squares = sum(n * n for n in documents) if documents else batch * length * length
    return attention_flops(1, heads, 1, 1, head_dim) * squares


def varlen_shape(
    heads: int, head_dim: int, documents: tuple[int, ...], longest: int
) -> tuple[int, int, int, int, int]:
    """What varlen kernels work on: heads, rows, head size, tiles at or below a diagonal, idle programs.

    A document of n rows is b = ⌈n/128⌉ blocks of them and b·(b+1)/2 tiles. Each has as many programs as
    the longest row that there may be has blocks.

    >>> varlen_shape(20, 64, (300, 100), 1024)
    (20, 400, 64, 7, 12)
    """
    blocks = [-(-n // FLASH_BLOCK_ROWS) for n in documents]
    tiles = sum(b * (b + 1) // 2 for b in blocks)
    idle = len(documents) * -(-longest // FLASH_BLOCK_ROWS) - sum(blocks)
    return heads, sum(documents), head_dim, tiles, idle


def kernel_shape(
    kind: str, batch: int, heads: int, length: int, head_dim: int, documents: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """The flash kernel that runs, forward or backward, and what it works on: whole rows, or documents.

    >>> kernel_shape("flash", 2, 20, 1024, 64, ())
    ('flash', (40, 1024, 64, 1024))
    """
    if documents:
        return kind.replace("flash", "varlen"), varlen_shape(heads, head_dim, documents, length)
    return kind, (batch * heads, length, head_dim, length)


def flash_attention(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, documents: tuple[int, ...] = ()
) -> Tensor:
    """softmax(QKᵀ)V without the T×T matrix; q is (B, H, T, D), k and v (B, H_kv, T, D).

    Keeps q, k, v, its result and the log-sum-exp of each row in fp32. `documents` holds the lengths of
    documents that do not see each other, all rows together. From Hopper on, PyTorch takes cuDNN's kernel
    for whole rows: its result is laid out as q is.
    """
    q, k, v = tape.low(q), tape.low(k), tape.low(v)
    name = "varlen" if documents else "attention"
    node = tape.node(name, (q, k, v), _flash_backward, (q, k, v))
    batch, heads, length, _ = q.shape
    out = tape.recall()
    if out is None:
        generator = [tape.empty((size,), DType.BYTE) for size in FLASH_RNG_BYTES]
        out = tape.empty_like(q)
        if documents or not tape.chip.has_cudnn_attention:
            out.strided = True  # stored as (B, T, H, D)
        results = [out, tape.empty((batch, heads, length), DType.FP32), *generator]
        _work(tape, "flash", q, k, documents, 1)
        for result in results:
            tape.keep(result)
        del generator
    else:
        results = [out, *[x for x in (tape.recall() for _ in range(3)) if x is not None]]
    for result in results:
        tape.save(node, result)
    node.extra = documents
    out.node = node
    return out


def _work(
    tape: Tape, kind: str, q: Tensor, k: Tensor, documents: tuple[int, ...], times: int
) -> None:
    """`times`: forward 1; backward 2, its recomputed QKᵀ not counted as work done."""
    batch, heads, length, head_dim = q.shape
    flops = rowwise_flops(batch, heads, length, head_dim, documents)
    moved = (2 * q.nbytes + 2 * k.nbytes) * times
    kind, shape = kernel_shape(kind, batch, heads, length, head_dim, documents)
    tape.work(kind, q.dtype, flops * times, moved, *shape)


def _flash_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    """Three gradients; while it runs an fp32 accumulator of dQ and Σ(dO∘O)."""
    q, k, v = saved[:3]
    batch, heads, length, head_dim = q.shape
    results: list[Tensor | None] = [tape.empty_like(x) for x in (q, k, v)]
    grouped = k.shape[1] != heads
    flash_backward_scratch(
        tape, batch, heads, length, head_dim, q.dtype, documents=len(node.extra), grouped=grouped
    )
    _work(tape, "flash_backward", q, k, node.extra, 2)
    return results


def flash_backward_scratch(
    tape: Tape,
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    dtype: DType,
    *,
    documents: int,
    grouped: bool,
) -> None:
    """While the backward kernels run: dQ summed in fp32, Σ(dO∘O), dK and dV of every head of a group."""
    if documents:  # varlen: rows of all documents together, each rounded up
        rounded = length + -(-documents // batch) * FLASH_BLOCK_ROWS
    else:
        rounded = -(-length // FLASH_BLOCK_ROWS) * FLASH_BLOCK_ROWS
    multiple = 32 if head_dim <= 128 else 64
    padded_dim = -(-head_dim // multiple) * multiple
    row_bytes = 4 * batch * rounded * heads
    spread = batch * heads * length * head_dim * dtype.size if grouped else 0
    if tape.chip.has_cudnn_attention and not documents:
        tape.scratch(4 * batch * heads * length * (head_dim + 1) + CUDNN_EXTRA_BYTES + 2 * spread)
    else:
        tape.scratch(row_bytes, row_bytes * padded_dim, spread, spread)


def efficient_attention(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, *, packed: bool = False
) -> Tensor:
    """The memory-efficient kernel: for fp32, and where a mask is given. Keeps what flash keeps.

    Query groups are spread over the heads first. A causal or sliding mask is (1, 1, T, T) and shared;
    `packed` rows have one each, which every call turns into numbers to add (B, 1, T, T) and keeps
    (aten/native/transformers/attention.cpp, convert_boolean_attn_mask).
    """
    q, k, v = tape.low(q), tape.low(k), tape.low(v)
    batch, heads, length, _ = q.shape
    if k.shape[1] != heads:
        k, v = (repeated(tape, x, heads) for x in (k, v))
    mask = None
    if packed:
        columns = -(-length // MASK_COLUMNS) * MASK_COLUMNS
        mask = tape.empty((batch, 1, length, columns), q.dtype)
        tape.pointwise("where", [mask])
    node = tape.node("attention", (q, k, v), _efficient_backward, (q, k, v))
    out = tape.recall()
    if out is None:
        out = tape.empty(q.shape, q.dtype)
        out.strided = True
        rounded = -(-length // EFFICIENT_ROWS) * EFFICIENT_ROWS
        logsumexp = tape.empty((batch, heads, rounded), DType.FP32)
        _work(tape, "efficient", q, k, (), 1)
        for result in (out, logsumexp):
            tape.keep(result)
        del result
    else:
        logsumexp = tape.recall() or out
    tape.save(node, out)
    tape.save(node, logsumexp)
    if mask is not None:
        tape.save(node, mask)
    node.extra = ()
    out.node = node
    return out


def repeated(tape: Tape, x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, H_kv, T, D) copied to every head of their group."""
    batch, _, length, head_dim = x.shape
    node = tape.node("repeat", (x,), _repeat_backward)
    out = tape.empty((batch, heads, length, head_dim), x.dtype)
    tape.pointwise("copy", [x, out])
    out.node = node
    return out


def _repeat_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    gradient = gradients[0]
    assert gradient is not None
    out = tape.empty(node.inputs[0][0], gradient.dtype)
    tape.pointwise("sum", [gradient, out])
    return [out]


def _efficient_backward(
    tape: Tape, node: Node, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    q, k = saved[0], saved[1]
    results: list[Tensor | None] = []
    for like in (q, k, k):
        gradient = tape.empty(like.shape, like.dtype)
        gradient.strided = True
        results.append(gradient)
        del gradient
    tape.scratch(4 * q.shape[0] * q.shape[1] * q.shape[2])  # Σ(dO∘O)
    _work(tape, "efficient_backward", q, k, (), 2)
    return results


def eager_attention(
    tape: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probability: float,
    *,
    softcap: bool = False,
    fp32_softmax: bool = True,
) -> Tensor:
    """softmax(QKᵀ)V op by op, with the T×T scores in memory several times."""
    _, heads, length, head_dim = q.shape
    if k.shape[1] != heads:
        k, v = repeated(tape, k, heads), repeated(tape, v, heads)
    dtype = v.dtype
    scores = scale(tape, _product(tape, q, k, length, length, head_dim))
    if softcap:
        scores = scale(tape, tanh(tape, scale(tape, scores)))
    scores = add(tape, scores, tape.empty((1, 1, length, length), scores.dtype))
    if fp32_softmax:
        scores = tape.cast(scores, DType.FP32)
    scores = softmax(tape, scores)
    scores = tape.cast(scores, dtype)
    scores = dropout(tape, scores, probability)
    out = _product(tape, scores, v, length, head_dim, length)
    out = contiguous(tape, transpose(tape, out))
    return transpose(tape, out)


def _product(tape: Tape, a: Tensor, b: Tensor, rows: int, columns: int, inner: int) -> Tensor:
    a, b = tape.low(a), tape.low(b)
    if a.strided:
        a = contiguous(tape, a)
    if b.strided:
        b = contiguous(tape, b)
    return bmm(tape, a, b, rows, columns, inner)


def math_attention(tape: Tape, q: Tensor, k: Tensor, v: Tensor, probability: float) -> Tensor:
    """SDPA's fallback in fp32 where query groups meet no kernel: the T×T matrix op by op."""
    _, heads, length, head_dim = q.shape
    scaled = scale(tape, q)
    if k.shape[1] != heads:
        k, v = repeated(tape, k, heads), repeated(tape, v, heads)
    scores = _product(tape, scaled, scale(tape, k), length, length, head_dim)
    scores = add(tape, scores, tape.empty((length, length), scores.dtype))
    scores = softmax(tape, scores)
    scores = dropout(tape, scores, probability)
    return _product(tape, scores, v, length, head_dim, length)
