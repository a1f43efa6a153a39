"""What the forward pass forgets and the backward pass computes again, block by block."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sftplan.facts.strategy import Checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sftplan.train.redraws import Redraw

KEPT_OPS = (  # matrix products and attention, by name: not every PyTorch has all of them
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward", "torch_attn::_varlen_attn",
)  # fmt: skip


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = getattr(op, "_name", "").partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _selective() -> tuple[Any, Any]:
    """Two modes, bare: torch.compile takes nothing else."""
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call, no-any-return]


def _redrawing(kind: Checkpointing, redraw: Redraw) -> tuple[Any, Any]:
    """What surrounds a block going forward, and going forward again."""
    forward, again = [redraw.going_forward()], [redraw.going_again()]
    if kind is Checkpointing.SELECTIVE:
        keeping, kept = _selective()
        forward.append(keeping)
        again.append(kept)
    return _within(forward), _within(again)


@contextmanager
def _within(contexts: list[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def checkpointed(
    forward: Callable[..., torch.Tensor], kind: Checkpointing, redraw: Redraw | None = None
) -> Callable[..., torch.Tensor]:
    """A block's forward pass that keeps only what `kind` says; the same in evaluation.

    `redraw` draws its random numbers again where graphs replay it; else the generator's state is kept.
    """
    if kind is Checkpointing.NONE:
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": redraw is None}
    if redraw is not None:
        options["context_fn"] = partial(_redrawing, kind, redraw)
    elif kind is Checkpointing.SELECTIVE:
        options["context_fn"] = _selective
    again = partial(checkpoint, forward, **options)

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        out: torch.Tensor = again(*args, **kwargs)
        return out

    return run
