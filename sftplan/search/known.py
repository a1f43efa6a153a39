"""What cannot be planned for a model whose family is not modelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError
from sftplan.facts.strategy import Attention, Loss, Offload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.facts.model import Anatomy


def check_traced_pins(pins: Mapping[str, Any], anatomy: Anatomy, model_type: str) -> None:
    """Refuse pins that a trace cannot show, or that the architecture has no code for.

    Raises:
        UsageError: Naming the option and what to give instead.
    """
    if pins.get("zero") or pins.get("offload", Offload.NONE) is not Offload.NONE:
        option = f"--zero {pins['zero']}" if pins.get("zero") else f"--offload {pins['offload']}"
        _refuse(option, f"{model_type} is traced unsharded", "`--zero 0 --offload none`")
    if pins.get("compile"):
        _refuse("--compile", f"{model_type} is traced uncompiled", "`--no-compile`")
    if pins.get("checkpointed_layers"):
        option = f"--checkpointed-layers {pins['checkpointed_layers']}"
        _refuse(option, f"{model_type} is traced with all layers alike", "leave it out")
    attention = pins.get("attention")
    if attention is not None and attention not in anatomy.attentions:
        others = " or ".join(f"`--attention {kind}`" for kind in anatomy.attentions)
        _refuse(f"--attention {attention}", f"transformers' {model_type} does not have it", others)
    packs = pins.get("packing") or attention is Attention.VARLEN
    if packs and not anatomy.takes_positions:
        problem = f"transformers' {model_type} takes no positions and cannot tell documents apart"
        _refuse("--packing", problem, "`--no-packing`")
    loss = pins.get("loss", Loss.FULL)
    if loss is not Loss.FULL and not anatomy.plain_head:
        problem = f"the logits of {model_type} are more than the product with its head"
        _refuse(f"--loss {loss}", problem, "`--loss full`, which is transformers' own")


def _refuse(option: str, problem: str, instead: str) -> None:
    message = f"{option}: {problem}"
    raise UsageError(message, instead)
