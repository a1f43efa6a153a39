"""A processor that stands in for a GPU: where CUDA's operators keep other tensors, they do so here.

PyTorch without a driver cannot run a backward pass on fake `cuda` tensors, so fakes live on `cpu`.
What differs there is put right while `as_on_cuda` is open: the attention kernels, dropout's mask, the
operators that CUDA's autocast runs in fp32, and the questions transformers asks of a mask's values.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sftplan.step.chip import Chip

Tensor = torch.Tensor
aten = torch.ops.aten
DEVICE = "cpu"
LOW = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256  # of the flash kernels, sdp_utils.cpp
MASK_ALIGNMENT = 16  # rows of an additive mask are padded to this, attention.cpp, pad_bias

# What CUDA's autocast casts to fp32 and the processor's does not: autocast_mode.h, AT_FORALL_FP32 and
# AT_FORALL_FP32_SET_OPT_DTYPE; those that language models use.
FP32_OPS = (
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "exp", "log", "rsqrt", "reciprocal", "softplus",
    "layer_norm", "native_layer_norm", "rms_norm", "nll_loss", "nll_loss_nd", "logsumexp",
    "softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList", "prod",
)  # fmt: skip
FP32_RESULT_OPS = ("softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList", "prod")


@contextmanager
def as_on_cuda(chip: Chip, *, packed: bool = False) -> Iterator[None]:
    """Everything that is different on a GPU like `chip`; `packed` rows hold several documents."""
    from transformers import masking_utils

    def packed_documents(position_ids: Tensor) -> Tensor | None:
        """What transformers reads off the positions: a document's number per token, or None."""
        if not packed:
            return None
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        stack.callback(library._destroy)
        for name in FP32_OPS:
            library.impl(name, _in_fp32(name), "AutocastCPU", allow_override=True)  # type: ignore[no-untyped-call]
        for target, attribute, replacement in (
            (functional, "scaled_dot_product_attention", _attention_on(chip)),
            (functional, "dropout", _dropout),
            (masking_utils, "is_tracing", lambda *_: False),
            (masking_utils, "find_packed_sequence_indices", packed_documents),
        ):
            stack.enter_context(patch.object(target, attribute, replacement))
        yield


def _in_fp32(name: str) -> Callable[..., Any]:
    """An operator as CUDA's autocast calls it."""
    base, _, overload = name.partition(".")
    operator = getattr(getattr(aten, base), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            if name not in FP32_RESULT_OPS:
                return operator(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})
            given = kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)
            if args[0].dtype in LOW and not given:
                kwargs["dtype"] = torch.float32
            return operator(*args, **kwargs)

    return call


def _dropout(
    input: Tensor,  # noqa: A002 - torch's own name, which callers may use
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """CUDA's dropout keeps a mask of a byte per element."""
    if not training or p == 0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return dropped


def _attention_on(chip: Chip) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` with the kernel that sdp_utils.cpp chooses on such a chip."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        query, key, value = (_autocast(x) for x in (query, key, value))
        with torch.autocast(DEVICE, enabled=False):
            grouped = key.shape[1] != query.shape[1]
            flash = query.dtype in LOW and query.shape[-1] <= MAX_HEAD_DIM
            if attn_mask is None and flash:
                return _flash(chip, query, key, value, dropout_p, is_causal, scale)
            if grouped and enable_gqa:  # only the flash kernels know groups
                found: tuple[Tensor, ...] = aten._scaled_dot_product_attention_math(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                    enable_gqa=True,
                )  # fmt: skip
                return found[0]
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)

    return attend


def _autocast(x: Tensor) -> Tensor:
    low = torch.is_autocast_enabled(DEVICE) and x.is_floating_point()
    return x.to(torch.get_autocast_dtype(DEVICE)) if low else x


def _flash(
    chip: Chip, query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """cuDNN's kernel where the chip has it, else the flash kernel; heads are padded to eights."""
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    found: tuple[Tensor, ...]
    if chip.has_cudnn_attention and not size % 8:
        keeps = any(x.requires_grad for x in (query, key, value))
        found = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, keeps, dropout, causal, False, scale=scale
        )  # fmt: skip
        return found[0]
    missing = -size % 8
    if missing:
        query, key, value = (functional.pad(x, (0, missing)) for x in (query, key, value))
    found = aten._scaled_dot_product_flash_attention(
        query,
        key,
        value,
        dropout,
        causal,
        False,
        scale=scale,
    )
    return found[0][..., :size] if missing else found[0]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """The memory-efficient kernel, which takes masks and fp32."""
    if mask is not None:
        if mask.dtype == torch.bool:
            none = torch.zeros((), dtype=query.dtype, device=query.device)
            mask = torch.where(mask, none, float("-inf")).to(query.dtype)
        missing = -mask.shape[-1] % MASK_ALIGNMENT
        if missing:
            mask = functional.pad(mask, (0, missing))[..., :-missing]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    keeps = any(x.requires_grad for x in (query, key, value))
    found: tuple[Tensor, ...] = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, keeps, dropout, causal, scale=scale
    )
    return found[0]
