"""What the kernels of compiled blocks and of the compiled head have to do.

Constants are from profiles of captured steps on one H200 (torch 2.11): of twenty (h200_compiled_kernels.csv,
2026-11-24), and kernel by kernel of gpt2-medium at 6 and 12 rows of 1,024, gpt2 at 24, opt-350m at 6, and
pythia-410m and smollm2-360m at 6 of 2,048 (2026-11-28).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.step.compiled.gpt2 import TOKENS_PER_PARTIAL_SUM
from sftplan.step.compiled.head import head_columns
from sftplan.step.ops.attention import kernel_shape, rowwise_flops
from sftplan.step.ops.matmul import matmul
from sftplan.step.tensor import DType, Tensor
from sftplan.step.work import STRIDED

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.step.blocks.context import Context
    from sftplan.step.compiled.graph import Graph
    from sftplan.step.tape import Tape

    Shapes = dict[str, tuple[int, ...]]

# Inductor's kernels of a block beside products, attention and casts of weights, in the forward pass and in the
# backward pass, where sums over rows for biases are two each, and the bytes they move over those that they and the
# products write.
FORWARD_KERNELS = 8
BACKWARD_KERNELS = {"layernorm": 16, "rmsnorm": 8}
FORWARD_MOVED = {"layernorm": 1.15, "rmsnorm": 1.35}
BACKWARD_MOVED = {"layernorm": 2.5, "rmsnorm": 2.4}
FORMED_AGAIN_KERNELS = 3  # both norms and the activation, which selective checkpointing forms again
# The rows of sums that a norm's backward kernel leaves are added up by a kernel of PyTorch's for each weight and
# bias: column by column, until there are so many that it shares them out.
MOST_PARTIAL_SUMS = 1024


def block_work(
    tape: Tape, context: Context, w: Shapes, x: Tensor, graph: Graph, products: int
) -> None:
    """The products, the attention, and one pass over every buffer for what is fused between them.

    `products` is 1 in the forward pass, 2 in the backward pass, which has two for each weight.
    """
    model = context.model
    tokens = x.shape[0] * x.shape[1]
    dtype = tape.autocast_dtype or x.dtype
    low = Tensor((), dtype, x.storage)
    for shape in w.values():
        if len(shape) > 1:
            _products(tape, tokens, shape[0], shape[1], low, products)
    flops = rowwise_flops(
        x.shape[0], model.num_heads, x.shape[1], model.head_dim, context.documents
    )
    attended = 2 * tokens * (model.query_size + model.kv_size) * dtype.size * products
    kind, work = kernel_shape(
        "flash" if products == 1 else "flash_backward", x.shape[0], model.num_heads, x.shape[1],
        model.head_dim, context.documents,
    )  # fmt: skip
    tape.work(kind, dtype, flops * products, attended, *work)
    casts, row_bytes = _moved(graph)
    for num_bytes in casts:
        tape.work("fused", dtype, 0, num_bytes)
    if model.activation == "gelu":
        tape.work("erf", dtype, 0, tokens * model.intermediate_size)
    if products == 1:
        moved, kernels = FORWARD_MOVED[model.norm] * row_bytes, FORWARD_KERNELS
    else:
        moved, kernels = BACKWARD_MOVED[model.norm] * row_bytes, BACKWARD_KERNELS[model.norm]
        moved -= _strided(tape, model, tokens, dtype)
        _sum_norms(tape, model, tokens)
    for _ in range(kernels):
        tape.work("fused", dtype, 0, int(moved) // kernels)


def _strided(tape: Tape, model: ModelShape, tokens: int, dtype: DType) -> int:
    """NeoX: gradients of queries, keys and values woven together head by head, two more turned by heads."""
    if model.family is not Family.NEOX:
        return 0
    woven = 2 * tokens * 3 * model.query_size * dtype.size
    turned = 2 * tokens * model.query_size * dtype.size
    tape.work("cat", dtype, 0, woven, *STRIDED)
    for _ in range(2):
        tape.work("copy", dtype, 0, turned, *STRIDED)
    return woven + 2 * turned


def _sum_norms(tape: Tape, model: ModelShape, tokens: int) -> None:
    """The gradients of both norms' weights, and biases, from the sums that their kernels leave."""
    rows = min(-(-tokens // TOKENS_PER_PARTIAL_SUM), MOST_PARTIAL_SUMS)
    vectors = 2 * (2 if model.norm == "layernorm" else 1)
    for _ in range(vectors):
        tape.work("partial_sums", DType.FP32, 0, rows * model.hidden_size * DType.FP32.size)


@lru_cache(maxsize=512)
def _moved(graph: Graph) -> tuple[tuple[int, ...], int]:
    """Bytes of each cast of a weight, and of what has a row for each token."""
    casts = graph.cast_weights()
    return tuple(each.nbytes + each.numel * DType.FP32.size for each in casts), graph.row_bytes()


def formed_again_work(tape: Tape, context: Context, x: Tensor, num_bytes: int) -> None:
    """What selective checkpointing forms again, of so many bytes."""
    moved = FORWARD_MOVED[context.model.norm] * num_bytes
    for _ in range(FORMED_AGAIN_KERNELS):
        tape.work("fused", x.dtype, 0, int(moved / FORMED_AGAIN_KERNELS))


def _products(tape: Tape, rows: int, columns: int, inner: int, low: Tensor, products: int) -> None:
    """x·Wᵀ, or the gradients of x and of W."""
    if products == 1:
        matmul(tape, "linear", rows, columns, inner, low)
    else:
        matmul(tape, "linear", rows, inner, columns, low)
        matmul(tape, "linear", columns, inner, rows, low)


def head_work(tape: Tape, graph: Graph, weight: Tensor, positions: int, products: int) -> None:
    """Products, and one kernel over the logits: it reads them; going backward it writes over them."""
    low = Tensor((), tape.autocast_dtype or weight.dtype, weight.storage)
    columns = head_columns(weight.shape[0])
    _products(tape, positions, columns, weight.shape[1], low, products)
    logits_bytes = positions * columns * low.dtype.size
    if products == 1:
        tape.work("online_softmax", low.dtype, 0, logits_bytes)
        tape.work("fused", low.dtype, 0, 2 * (graph.written_bytes() - logits_bytes))
    else:
        padded = columns != weight.shape[0]
        kind = "padded_cross_entropy_backward" if padded else "cross_entropy_backward"
        tape.work(kind, low.dtype, 0, 2 * logits_bytes)
        tape.work("fused", low.dtype, 0, 2 * graph.written_bytes())
