"""That packed documents do not see each other: checked on the first batch, before training.

Two questions to the model itself, in the very call that training makes. Are a packed document's
logits those it gets alone? And do they stay as they are when another document of its row changes?
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.errors import TrainingFailedError
from sftplan.train.compiled import eager_blocks
from sftplan.train.loss import head_of, scores_of
from sftplan.train.model import AUTOCAST
from sftplan.train.step import Stepper, hidden_states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftplan.data.collate import MicroBatch
    from sftplan.train.inputs import Inputs

DOCUMENTS_CHECKED = 4
TOLERANCES = {
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}  # of the largest logit


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingCheck:
    """Largest differences between logits, as shares of the largest logit."""

    documents: int
    separate: float
    leak: float

    def __str__(self) -> str:
        return (
            f"packing: logits of {self.documents} packed documents equal separate ones within "
            f"{self.separate:.1e} of the largest, and change by {self.leak:.1e} with their neighbours"
        )


@contextmanager
def quiet_model(stepper: Stepper) -> Iterator[None]:
    """No dropout, no gradients, no compilation, products in the types of training."""
    low = AUTOCAST.get(stepper.precision)
    stepper.model.eval()
    try:
        with (
            eager_blocks(stepper.model),
            torch.no_grad(),
            torch.autocast(stepper.device.type, dtype=low, enabled=low is not None),
        ):
            yield
    finally:
        stepper.model.train()


def check_packing(stepper: Stepper, batch: MicroBatch, inputs: Inputs) -> PackingCheck | None:
    """The two differences; None where no row holds two documents.

    Raises:
        TrainingFailedError: Documents see each other.
    """
    spans = _second_documents(batch)
    if stepper.world_size > 1:  # what is shared out is gathered by all ranks, or by none
        count = torch.tensor(len(spans), device=stepper.device)
        distributed.all_reduce(count, distributed.ReduceOp.MIN)
        spans = spans[: int(count)]
    if not spans:
        return None
    low = AUTOCAST.get(stepper.precision) or next(stepper.model.parameters()).dtype
    with quiet_model(stepper):
        found: PackingCheck = stepper.update.whole(
            partial(_compared, stepper, batch, inputs, spans)
        )
    if not max(found.separate, found.leak) <= TOLERANCES[low]:
        message = f"packed documents see each other; {found}"
        raise TrainingFailedError(message, "train with --no-packing, and report this model to us")
    return found


def _compared(
    stepper: Stepper, batch: MicroBatch, inputs: Inputs, spans: list[tuple[int, int]]
) -> PackingCheck:
    """The differences, over some documents."""
    packed = hidden_states(stepper.model, inputs)
    changed = hidden_states(stepper.model, _first_documents_changed(batch, inputs))
    largest = separate = leak = 0.0
    for start, stop in spans:
        alone = _alone(stepper, inputs.input_ids.view(-1)[start:stop])
        here, there = (
            stepper.update.at_head(partial(_scores, stepper), hidden[start:stop])
            for hidden in (packed, changed)
        )
        largest = max(largest, alone.abs().max().item())
        separate = max(separate, (here - alone).abs().max().item())
        leak = max(leak, (here - there).abs().max().item())
    return PackingCheck(documents=len(spans), separate=separate / largest, leak=leak / largest)


def _scores(stepper: Stepper, hidden: torch.Tensor) -> torch.Tensor:
    return scores_of(hidden, head_of(stepper.model))


def _spans(batch: MicroBatch) -> list[tuple[int, int]]:
    """Begin and end of every document, padding included."""
    ends = batch.cu_seqlens[: batch.num_documents + 1]
    return list(pairwise(ends))


def _second_documents(batch: MicroBatch) -> list[tuple[int, int]]:
    """The shortest documents that follow another one in their row: their logits take little room."""
    length, padding = batch.shape.row_len, _padding_starts(batch)
    later = [span for span in _spans(batch) if span[0] % length and span[0] not in padding]
    return sorted(later, key=lambda span: span[1] - span[0])[:DOCUMENTS_CHECKED]


def _padding_starts(batch: MicroBatch) -> set[int]:
    """Where the padding of each row begins: after its last target, in a document without one."""
    kept = set(batch.keep[: batch.num_targets])
    return {start for start, stop in _spans(batch) if kept.isdisjoint(range(start, stop))}


def _first_documents_changed(batch: MicroBatch, inputs: Inputs) -> Inputs:
    """The same with every row's first document replaced by other tokens."""
    ids = inputs.input_ids.clone().view(-1)
    vocab = int(ids.max()) + 1
    for start, stop in _spans(batch):
        if start % batch.shape.row_len == 0:
            ids[start:stop] = (ids[start:stop] + 1) % vocab
    return replace(inputs, input_ids=ids.view(inputs.input_ids.shape))


def _alone(stepper: Stepper, ids: torch.Tensor) -> torch.Tensor:
    """A document's logits from transformers' own forward pass, with transformers' own attention."""
    model: Any = stepper.model
    used = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if used.startswith("sftplan") else used)
    try:
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(used)
    return logits
