"""What every block shares: the model, the strategy, rotary tables, and the choice of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.facts.captured import attention_dropout
from sftplan.facts.strategy import Attention
from sftplan.step.ops.attention import (
    eager_attention,
    efficient_attention,
    flash_attention,
    math_attention,
    repeated,
)
from sftplan.step.ops.pointwise import add, gelu, gelu_new, mul, neg, relu, silu
from sftplan.step.ops.shape import cat_last, slice_last
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor

    LayerWeights = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tape, Tensor], Tensor]] = {
    "gelu_new": gelu_new,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu,
    "gelu_fast": gelu_new,
    "silu": silu,
    "swish": silu,
    "relu": relu,
}


@dataclass(frozen=True, slots=True)
class Context:
    """What a block needs to know beside its weights.

    `tables` are cos and sin (1, T, rotary dimensions) where positions rotate; `documents` the lengths
    of the packed documents, empty where rows are attended whole.
    """

    model: ModelShape
    strategy: Strategy
    tables: tuple[Tensor, Tensor] | None = None
    documents: tuple[int, ...] = ()

    @property
    def attention_dropout(self) -> float:
        """The dropout inside the attention."""
        return attention_dropout(self.strategy, self.model)


def activation(tape: Tape, context: Context, x: Tensor) -> Tensor:
    """The model's non-linearity."""
    return ACTIVATIONS[context.model.activation](tape, x)


def attention(tape: Tape, context: Context, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ)V by the kernel that the strategy, the type and the mask allow."""
    model, length = context.model, q.shape[2]
    kind = context.strategy.attention
    if kind is Attention.EAGER or model.attention_softcap is not None:
        return eager_attention(
            tape, q, k, v, context.attention_dropout, softcap=model.attention_softcap is not None,
            fp32_softmax=model.model_type != "gpt2",
        )  # fmt: skip
    if kind is Attention.VARLEN:
        if (
            model.num_kv_heads != model.num_heads
        ):  # varlen_attn has grouped heads since PyTorch 2.12
            k, v = (repeated(tape, tape.low(x), model.num_heads) for x in (k, v))
        return flash_attention(tape, q, k, v, context.documents or (length,) * q.shape[0])
    kinds = model.layer_kinds
    sliding = model.sliding_window is not None and (not kinds or kinds[number] == "sliding")
    masked = sliding and length > (model.sliding_window or 0)
    masked = masked or bool(context.documents)  # packed rows need a block-diagonal mask
    full = tape.autocast_dtype is None and q.dtype is DType.FP32
    if full and not masked and model.num_kv_heads != model.num_heads:
        return math_attention(tape, q, k, v, context.attention_dropout)
    if full or masked:
        return efficient_attention(tape, q, k, v, packed=bool(context.documents))
    return flash_attention(tape, q, k, v)


def rotary_tables(
    tape: Tape, model: ModelShape, shape: tuple[int, int], dtype: DType
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions (B, T), formed in fp32 and kept in the type of the hidden states."""
    size = int(model.head_dim * model.rotary_fraction)
    positions = tape.empty(shape, DType.INT64)
    as_float = tape.empty(shape, DType.FP32)
    angles = tape.empty((*shape, size // 2), DType.FP32)
    tape.touch_workspace()
    both = tape.empty((*shape, size), DType.FP32)
    tables = []
    for _ in ("cos", "sin"):
        value = tape.empty(both.shape, DType.FP32)
        value = tape.empty(both.shape, DType.FP32)  # times the attention scaling
        tables.append(value)
    cosine, sine = (tape.cast(table, dtype) for table in tables)
    del positions, as_float, angles, both
    return cosine, sine


def rotate(tape: Tape, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin for (B, H, T, D), as transformers writes it."""
    return add(tape, mul(tape, x, cosine), mul(tape, _rotate_half(tape, x), sine))


def _rotate_half(tape: Tape, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first = slice_last(tape, x, half)
    second = slice_last(tape, x, half)
    return cat_last(tape, neg(tape, second), first)


def rotate_both(
    tape: Tape, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first dimensions of each head, the others, if there are any, passed on."""
    size = tables[0].shape[-1]
    if size == q.shape[-1]:
        rotated_q = rotate(tape, q, *tables)
        return rotated_q, rotate(tape, k, *tables)
    rest = q.shape[-1] - size
    rotated_q = rotate(tape, slice_last(tape, q, size), *tables)
    rotated_k = rotate(tape, slice_last(tape, k, size), *tables)
    rotated_q = cat_last(tape, rotated_q, slice_last(tape, q, rest))
    rotated_k = cat_last(tape, rotated_k, slice_last(tape, k, rest))
    return rotated_q, rotated_k
