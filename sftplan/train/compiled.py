"""torch.compile block by block: equal blocks share one graph, so the first step stays short."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sftplan.facts.strategy import Checkpointing, checkpointing_of
from sftplan.train.activation import sigmoid_gelus
from sftplan.train.checkpointing import checkpointed
from sftplan.train.dropout import hash_dropouts
from sftplan.train.loss import chunk_gradient, fused_chunk_gradient, response_loss
from sftplan.train.redraws import Redraws

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def blocks_of(model: Any) -> list[torch.nn.Module]:
    """The repeated blocks of a transformers model, in order."""
    return _blocks_and_runner(model)[0]


def _blocks_and_runner(model: Any) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The blocks, and the module that runs them: OPT's decoder, say, which its LM calls past its base model."""
    wanted = model.config.num_hidden_layers
    for module in model.base_model.modules():
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == wanted:
                return list(child), module
    message = f"{type(model).__name__} has no list of {wanted} blocks"
    raise ValueError(message)


def prepare_blocks(
    model: Any, *, checkpointing: Checkpointing, checkpointed_layers: int | None = None,
    compiled: bool, captured: bool = False,
) -> Redraws | None:  # fmt: skip
    """Make blocks checkpointed, compiled, or both: compiled around the checkpoint.

    What graphs of `captured` passes draw again comes back; compiled blocks see to that themselves.
    """
    blocks, runner = _blocks_and_runner(model)
    redraws = None
    if compiled:
        from sftplan.train.reductions import hold_whole_rows

        hold_whole_rows()
        hash_dropouts(runner, blocks)
        sigmoid_gelus(blocks)
    elif captured and checkpointing is not Checkpointing.NONE:
        redraws = Redraws(runner, blocks)
    for number, block in enumerate(blocks):
        redraw = None if redraws is None else redraws.of_blocks[number]
        kind = checkpointing_of(checkpointing, checkpointed_layers, number)
        forward = checkpointed(block.forward, kind, redraw)
        if compiled:
            forward = torch.compile(forward, dynamic=False)
        block.forward = forward
    return redraws


@contextmanager
def eager_blocks(model: Any) -> Iterator[None]:
    """The blocks as transformers wrote them: evaluation compiles no graphs of its own."""
    prepared = [(block, block.__dict__.pop("forward", None)) for block in blocks_of(model)]
    try:
        yield
    finally:
        for block, forward in prepared:
            if forward is not None:
                block.forward = forward


def loss_functions(*, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`response_loss` and `chunk_gradient`, each one graph where compiled."""
    if not compiled:
        return response_loss, chunk_gradient
    return (
        torch.compile(response_loss, dynamic=False),
        torch.compile(fused_chunk_gradient, dynamic=False),
    )
