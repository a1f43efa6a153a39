"""Which steps are replayed as CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Attention, Checkpointing, Offload

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy


def is_captured(strategy: Strategy, model: ModelShape, seq_len: int) -> bool:
    """Whether training replays the passes as CUDA graphs: then no operation waits for the host.

    Steps without DeepSpeed whose attention needs no mask, for which transformers waits for the GPU: under varlen
    attention, or compiled under SDPA. Uncompiled SDPA stays the plain step that everybody's own loop takes.
    Uncompiled checkpointing of blocks that draw keeps the generator's state, which no graph can.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Strategy
    >>> gpt2 = builtin("gpt2")
    >>> is_captured(Strategy(compile=True), gpt2, 1024), is_captured(Strategy(), gpt2, 1024)
    (True, False)
    >>> is_captured(Strategy(compile=True, packing=True), gpt2, 1024)
    False
    >>> is_captured(Strategy(compile=True, packing=True, attention=Attention.VARLEN), gpt2, 1024)
    True
    """
    alone = strategy.zero == 0 and strategy.offload is Offload.NONE
    again = strategy.checkpointing is not Checkpointing.NONE and not strategy.compile
    fixed = not (again and draws(strategy, model))
    compiled = strategy.attention is Attention.SDPA and strategy.compile
    maskless = compiled and not needs_mask(strategy, model, seq_len)
    return alone and fixed and (strategy.attention is Attention.VARLEN or maskless)


def draws(strategy: Strategy, model: ModelShape) -> bool:
    """Whether a block draws random numbers; a traced one may.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Strategy
    >>> [draws(Strategy(), builtin(name)) for name in ("gpt2", "llama-2-7b")]
    [True, False]
    """
    dropped = attention_dropout(strategy, model) > 0 or model.residual_dropout > 0
    return dropped or model.anatomy is not None


def attention_dropout(strategy: Strategy, model: ModelShape) -> float:
    """The dropout inside the attention."""
    chosen = strategy.attention_dropout
    return model.attention_dropout if chosen == "model" else chosen


def needs_mask(strategy: Strategy, model: ModelShape, seq_len: int) -> bool:
    """Whether SDPA needs more than to be causal: among packed documents, or where a window slides.

    >>> from sftplan.facts.catalogue import builtin
    >>> from sftplan.facts.strategy import Strategy
    >>> [needs_mask(Strategy(), builtin("mistral-7b"), length) for length in (4096, 8192)]
    [False, True]
    """
    slides = model.sliding_window is not None and seq_len > model.sliding_window
    return strategy.packing or slides or model.attention_softcap is not None
