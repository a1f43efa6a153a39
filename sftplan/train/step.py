"""The step: forward, loss and backward of each pass, then clipping and the update.

The one function that training runs is the one that the dry run measures. It never waits for the
device, except under fp16, whose loss scale is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.facts.strategy import Loss, Precision
from sftplan.train.attention import attention_inputs
from sftplan.train.compiled import loss_functions
from sftplan.train.loss import chunked_loss, gather, head_of
from sftplan.train.model import AUTOCAST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sftplan.train.captured import CapturedPasses
    from sftplan.train.inputs import Inputs
    from sftplan.train.sharded import ShardedUpdate
    from sftplan.train.update import Update

Tensor = torch.Tensor


@dataclass(slots=True)
class LossScale:
    """Dynamic loss scaling of fp16: doubled after `interval` good steps, halved after a bad one."""

    value: float = 2.0**16
    interval: int = 2000
    good_steps: int = 0
    skipped: int = 0

    def seen(self, *, overflow: bool) -> None:
        """Take note of how a step went."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        self.skipped += overflow
        if overflow:
            self.value /= 2
        elif self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0


def unmarked(_: str) -> None:
    """Training does not look at the phases of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """All that a step works with; `mark` is told which phase begins, for the dry run to measure it."""

    model: Any
    update: Update | ShardedUpdate
    precision: Precision
    loss: Loss
    max_grad_norm: float
    device: torch.device
    world_size: int = 1
    scale: LossScale | None = None
    response: Callable[..., Tensor] = field(default=loss_functions(compiled=False)[0])
    chunk: Callable[..., Any] = field(default=loss_functions(compiled=False)[1])
    mark: Callable[[str], None] = field(default=unmarked)
    captured: CapturedPasses | None = None

    def release(self) -> None:
        """Give back what passes keep between steps, for what else needs memory."""
        if self.captured is not None:
            self.captured.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A step as the device knows it; a `Reading` tells it to the host."""

    loss: Tensor  # mean over the step's targets, all ranks
    grad_norm: Tensor  # before clipping, all ranks
    skipped: Tensor  # 1 where loss or norm was not finite and the weights stayed


class Reading:
    """Numbers on their way to the host, behind the step that makes them and ahead of the next."""

    def __init__(self, *numbers: Tensor) -> None:
        packed = torch.stack([number.detach().float() for number in numbers])
        self._event: torch.cuda.Event | None = None
        self._host = packed
        if packed.device.type == "cuda":
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def values(self) -> list[float]:
        """The numbers; waits for the step they are from."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._host.tolist()
        return found


def train_step(
    stepper: Stepper, passes: Sequence[Inputs], *, num_targets: int, learning_rate: float
) -> Outcome:
    """One optimizer step over its passes; `num_targets` counts those of all passes and ranks."""
    scale = 1.0 if stepper.scale is None else stepper.scale.value
    factor = torch.full((), scale / num_targets, device=stepper.device)
    total = torch.zeros((), device=stepper.device)
    captured = stepper.captured if stepper.captured and stepper.captured.begin_step() else None
    for number, inputs in enumerate(passes):
        first, last = not number, number == len(passes) - 1
        if captured is not None:
            run = partial(scaled_loss, stepper)
            loss = captured.run(run, inputs, factor, first=first, last=last, mark=stepper.mark)
            if loss is not None:
                total += loss
                continue
            captured = None
        stepper.mark("forward")
        loss = scaled_loss(stepper, inputs, factor)
        stepper.mark("backward")
        stepper.update.backward(loss, scale=scale, last=last)
        total += loss.detach()
        del loss
    if stepper.world_size > 1:
        stepper.mark("communication")
        if captured is None:
            stepper.update.sum_over_ranks()
        distributed.all_reduce(total)  # each rank's loss was divided by the targets of all of them
    stepper.mark("optimizer")
    total /= scale
    norm, skip = stepper.update.advance(
        total, scale=scale, learning_rate=learning_rate, max_grad_norm=stepper.max_grad_norm
    )
    if stepper.scale is not None:
        stepper.scale.seen(overflow=bool(skip))
    stepper.mark("end")
    return Outcome(loss=total, grad_norm=norm, skipped=skip)


def scaled_loss(stepper: Stepper, inputs: Inputs, factor: Tensor) -> Tensor:
    """Summed loss of one pass, times `factor`."""

    def whole() -> Tensor:
        low = AUTOCAST.get(stepper.precision)
        with torch.autocast(stepper.device.type, dtype=low, enabled=low is not None):
            if stepper.loss is Loss.FULL:
                return full_loss(stepper.model, inputs) * factor
            kept = gather(hidden_states(stepper.model, inputs), inputs.keep)
            loss: Tensor = stepper.update.at_head(at_head, kept)
            return loss

    def at_head(kept: Tensor) -> Tensor:
        head = head_of(stepper.model)
        if stepper.loss is Loss.CHUNKED:
            trains = torch.is_grad_enabled()
            onto = stepper.update.gradient_to_add_to(head.weight) if trains else None
            return chunked_loss(kept, inputs.targets, head, factor, stepper.chunk, onto)
        summed = stepper.response(kept, inputs.targets, head.weight, head.bias, head.softcap)
        return summed * factor

    loss: Tensor = stepper.update.whole(whole)
    return loss


def model_inputs(inputs: Inputs) -> dict[str, Any]:
    """What the model is called with. No mask, no cache: both would mix packed documents.

    Where rows simply count, no positions are given: not every architecture takes them.
    """
    positions = {} if inputs.position_ids is None else {"position_ids": inputs.position_ids}
    return {
        "input_ids": inputs.input_ids,
        "use_cache": False,
        **positions,
        **attention_inputs(inputs.cu_seqlens, inputs.longest),
    }


def hidden_states(model: Any, inputs: Inputs) -> Tensor:
    """What enters the LM head, one row per position."""
    out: Tensor = model.base_model(**model_inputs(inputs)).last_hidden_state
    return out.reshape(-1, out.shape[-1])


def full_loss(model: Any, inputs: Inputs) -> Tensor:
    """transformers' own loss over all positions, summed."""
    labels = torch.full_like(inputs.input_ids.view(-1), -100)
    labels = torch.cat([labels, labels[:2]])  # position i+1 is the target of i; unused: the end
    labels[inputs.keep + 1] = inputs.targets
    labels = labels[: inputs.input_ids.numel()].view(inputs.input_ids.shape)
    loss: Tensor = model(**model_inputs(inputs), labels=labels, num_items_in_batch=1).loss
    return loss
