"""Which steps are replayed as CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Attention, Loss, Offload

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy


def is_captured(strategy: Strategy, model: ModelShape, seq_len: int) -> bool:
    """Whether training replays the passes as CUDA graphs: then no operation waits for the host.

    Steps without DeepSpeed whose attention needs no mask, for which transformers waits for the GPU. Uncompiled
    under SDPA, with the loss over every position, stays the plain step that everybody's own loop takes.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Strategy
    >>> gpt2 = builtin("gpt2")
    >>> [is_captured(Strategy(loss=loss), gpt2, 1024) for loss in (Loss.RESPONSE, Loss.FULL)]
    [True, False]
    >>> is_captured(Strategy(loss=Loss.FULL, compile=True), gpt2, 1024)
    True
    >>> [is_captured(Strategy(packing=True, attention=a), gpt2, 1024) for a in (Attention.SDPA, Attention.VARLEN)]
    [False, True]
    """
    alone = strategy.zero == 0 and strategy.offload is Offload.NONE
    plain = strategy.loss is Loss.FULL and not strategy.compile
    causal = is_causal(strategy, model, seq_len) and not plain
    return alone and (strategy.attention is Attention.VARLEN or causal)


def is_causal(strategy: Strategy, model: ModelShape, seq_len: int) -> bool:
    """Whether attention is SDPA that needs no mask beyond being causal: none is asked of transformers."""
    return strategy.attention is Attention.SDPA and not needs_mask(strategy, model, seq_len)


def waits_for_mask(strategy: Strategy, model: ModelShape, seq_len: int) -> bool:
    """Whether transformers is asked for a mask: it reads position ids back first, to see what rows hold."""
    varlen = strategy.attention is Attention.VARLEN
    return not (varlen or is_causal(strategy, model, seq_len))


def attention_dropout(strategy: Strategy, model: ModelShape) -> float:
    """The dropout inside the attention."""
    chosen = strategy.attention_dropout
    return model.attention_dropout if chosen == "model" else chosen


def needs_mask(strategy: Strategy, model: ModelShape, seq_len: int) -> bool:
    """Whether SDPA needs more than to be causal: among packed documents, or where a window slides.

    An architecture of which there is only a trace may.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Strategy
    >>> [needs_mask(Strategy(), builtin("mistral-7b"), length) for length in (4096, 8192)]
    [False, True]
    """
    slides = model.sliding_window is not None and seq_len > model.sliding_window
    traced = model.anatomy is not None
    return strategy.packing or slides or traced or model.attention_softcap is not None
