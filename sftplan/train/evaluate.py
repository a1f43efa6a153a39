"""Loss on held-out examples: of the responses alone, and of every token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import distributed

from sftplan.step.loss import CHUNK_ROWS
from sftplan.train.inputs import Inputs, Layout, to_device
from sftplan.train.loss import gather, head_of, response_loss
from sftplan.train.packing_check import quiet_model
from sftplan.train.step import Stepper, hidden_states

if TYPE_CHECKING:
    from sftplan.data.batches import Batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The same rows twice: with the responses' targets, and with all tokens'."""

    responses: Batches
    all_tokens: Batches
    layout: Layout
    rank: int = 0


def evaluate(stepper: Stepper, evaluation: Evaluation) -> dict[str, float]:
    """Mean loss per target, in the types of training; draws no random number."""
    sums = torch.zeros(2, dtype=torch.float64, device=stepper.device)
    counts = [0, 0]
    kinds = (evaluation.responses, evaluation.all_tokens)
    with quiet_model(stepper):
        for number in range(evaluation.responses.steps_per_epoch):
            steps = [kind.step(0, number, rank=evaluation.rank) for kind in kinds]
            for pair in zip(*(step.micro_batches for step in steps), strict=True):
                both = [to_device(each, evaluation.layout, stepper.device) for each in pair]
                sums += stepper.update.whole(partial(_summed_pair, stepper, both))
            for at, step in enumerate(steps):
                counts[at] += step.num_targets
    if stepper.world_size > 1:
        distributed.all_reduce(sums)
    masked, unmasked = sums.tolist()
    return {
        "eval_loss": masked / counts[0],
        "eval_loss_all_tokens": unmasked / counts[1],
        "eval_response_tokens": counts[0],
        "eval_tokens": counts[1],
    }


def _summed_pair(stepper: Stepper, both: list[Inputs]) -> torch.Tensor:
    """Summed losses of the same rows with other targets."""
    hidden = hidden_states(stepper.model, both[0])

    def at_head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([_summed(stepper, hidden, inputs) for inputs in both])

    found: torch.Tensor = stepper.update.at_head(at_head, hidden)
    return found.double()


def _summed(stepper: Stepper, hidden: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Summed loss of one pass, a chunk of positions at a time."""
    head = head_of(stepper.model)
    total = torch.zeros((), device=hidden.device)
    for start in range(0, inputs.keep.shape[0], CHUNK_ROWS):
        at = slice(start, start + CHUNK_ROWS)
        kept = gather(hidden, inputs.keep[at])
        total += response_loss(kept, inputs.targets[at], head.weight, head.bias, head.softcap)
    return total
