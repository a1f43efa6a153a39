"""Attention over packed documents, handed to transformers under a name of our own.

transformers gives a name that its mask interface does not know no mask at all: documents are told
apart by their boundaries alone, `cu_seq_lens_q`, which its models pass down to every layer. So is SDPA
where rows hold one document each.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn

from sftplan.facts.strategy import Attention

if TYPE_CHECKING:
    from collections.abc import Mapping

VARLEN = "sftplan_varlen"
CAUSAL = "sftplan_causal"
MAX_HEAD_DIM = 256  # of the flash kernels behind varlen_attn
_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)  # they differ by version


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The attention that runs: its name in transformers, whether rows lie flat in one, whether graphs hold it.

    `note` says why it is not the one that was asked for.
    """

    name: str
    flat: bool
    captured: bool = False
    note: str | None = None


def choose_kernel(
    wanted: Attention,
    *,
    device: torch.device,
    low: torch.dtype,
    config: Any,
    causal: bool = False,
    captured: bool = False,
) -> Kernel:
    """What runs for `wanted` here: varlen needs CUDA, 16-bit products and a head that fits.

    `causal`: to be that is all that SDPA needs. `captured` steps are replayed as CUDA graphs, where there
    is CUDA.
    """
    captured = captured and device.type == "cuda"
    if (
        getattr(config, "attn_logit_softcapping", None) is not None
        and wanted is not Attention.EAGER
    ):
        note = f"{wanted} attention cannot cap scores as this model does: eager attention instead"
        return Kernel(name="eager", flat=False, note=note)
    if wanted is Attention.SDPA and causal:
        register_causal()
        return Kernel(name=CAUSAL, flat=False, captured=captured)
    if wanted is not Attention.VARLEN:
        return Kernel(name=wanted.value, flat=False)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device.type != "cuda":
        reason = "varlen attention needs a GPU"
    elif low not in (torch.float16, torch.bfloat16):
        reason = "varlen attention needs 16-bit products"
    elif head > MAX_HEAD_DIM:
        reason = f"varlen attention has heads of up to {MAX_HEAD_DIM}, this model's have {head}"
    else:
        register(low)
        return Kernel(name=VARLEN, flat=True, captured=captured)
    return Kernel(name="sdpa", flat=False, note=f"{reason}: block-diagonal SDPA instead")


def register(low: torch.dtype) -> None:
    """Make `attn_implementation=VARLEN` known to transformers, with products in the type `low`."""
    from transformers import AttentionInterface

    def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return _varlen(low, *args, **kwargs)

    AttentionInterface.register(VARLEN, attend)


def register_causal() -> None:
    """Make `attn_implementation=CAUSAL` known to transformers: its SDPA, without a look for documents.

    That look waits for the GPU. Rows hold one document each, padded behind it: no token sees padding.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def _varlen(
    low: torch.dtype,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(QKᵀ)V within each document; (1, H, N, D) in, (1, N, H, D) out."""
    heads, length, size = query.shape[1:]
    q, k, v = (x.transpose(1, 2).reshape(length, -1, size).to(low) for x in (query, key, value))
    options = _options(scaling, sliding_window)
    if k.shape[1] != heads:
        if "enable_gqa" in _PARAMETERS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    assert cu_seq_lens_q is not None, "this architecture does not pass document boundaries down"
    assert max_length_q is not None
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    assert isinstance(out, torch.Tensor)
    return out.view(1, length, heads, size), None


def _options(scaling: float | None, sliding_window: int | None) -> dict[str, Any]:
    """Causal, in the spelling of this PyTorch."""
    options: dict[str, Any] = {}
    if scaling is not None and "scale" in _PARAMETERS:
        options["scale"] = scaling
    if "window_size" in _PARAMETERS:
        options["window_size"] = ((sliding_window or 0) - 1, 0)
    else:
        options["is_causal"] = True
    return options


def attention_inputs(cu_seqlens: torch.Tensor | None, longest: int) -> Mapping[str, Any]:
    """What transformers passes down to the attention; nothing where rows are not flat."""
    if cu_seqlens is None:
        return {}
    return {
        "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
