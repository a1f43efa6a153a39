"""Forward and backward passes of any model as plain data, for a plan to be made of them."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from sftplan.plan.build import strategy_record
from sftplan.train.attention import choose_kernel
from sftplan.train.compiled import blocks_of
from sftplan.train.inputs import Inputs
from sftplan.train.model import product_dtype, without_pad_token
from sftplan.train.session import build_stepper
from sftplan.train.settings import Settings
from sftplan.train.step import scaled_loss
from sftplan.verify.trace.accumulation import added_in_place, root
from sftplan.verify.trace.hosts import HostCounter
from sftplan.verify.trace.layers import LayerRecorder, watch
from sftplan.verify.trace.run import faked
from sftplan.verify.trace.stand_in import DEVICE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.strategy import Strategy
    from sftplan.step.batch import Batch
    from sftplan.step.chip import Chip
    from sftplan.train.step import Stepper


def trace_passes(
    config: Any, strategy: Strategy, batch: Batch, chip: Chip, *, num_passes: int
) -> list[dict[str, Any]]:
    """The first passes of a step as `step.traced.Pass` holds them; `config` is the trained model's."""
    kernel = choose_kernel(
        strategy.attention, device=torch.device("cuda"), low=product_dtype(strategy.precision),
        config=config,
    )  # fmt: skip
    documents = batch.documents if kernel.flat else ()
    recorder = LayerRecorder(chip, documents)
    with faked(chip, packed=strategy.packing), recorder, HostCounter(recorder.count):
        stepper = build_stepper(
            strategy_record(strategy, ()), config, kernel, Settings(random_weights=True),
            device=torch.device(DEVICE), deepspeed={},
        )  # fmt: skip
        blocks = blocks_of(stepper.model)
        recorder.vocab_size = config.vocab_size
        watch(recorder, stepper.model, blocks, checkpointed=strategy.checkpointing != "none")
        inputs = _inputs(batch, flat=kernel.flat, packed=strategy.packing)
        with without_pad_token(stepper.model):
            _run(recorder, stepper, inputs, num_passes)
        return _passes(recorder)


def _run(recorder: LayerRecorder, stepper: Stepper, inputs: Inputs, num_passes: int) -> None:
    """As `train_step` does it, up to the update."""
    factor = torch.ones((), device=DEVICE)
    for number in range(num_passes):
        recorder.mark("forward")
        loss = scaled_loss(stepper, inputs, factor)
        recorder.mark("backward")
        stepper.update.backward(loss, scale=1.0, last=number == num_passes - 1)
        del loss
    recorder.mark("end")


def _inputs(batch: Batch, *, flat: bool, packed: bool) -> Inputs:
    """Tensors of a batch's shapes."""
    tokens = batch.num_tokens
    shape = (1, tokens) if flat else (batch.rows, batch.length)
    ends = [0]
    for length in batch.documents:
        ends.append(ends[-1] + length)
    return Inputs(
        input_ids=torch.empty(shape, dtype=torch.int64),
        position_ids=torch.empty(shape, dtype=torch.int64) if packed or flat else None,
        cu_seqlens=torch.empty(len(ends), dtype=torch.int32) if flat else None,
        longest=batch.length,
        keep=torch.empty(batch.num_targets, dtype=torch.int64),
        targets=torch.empty(batch.num_targets, dtype=torch.int64),
    )


def _passes(recorder: LayerRecorder) -> list[dict[str, Any]]:
    """Each pass by itself, its storages numbered from 0."""
    events, owner, dropped = added_in_place(recorder.events, recorder.sums)
    kinds = list(recorder.kinds)
    for number in owner:
        kinds[root(owner, number)] = kinds[number]
    gradients = {root(owner, number): name for name, number in recorder.gradients.items()}
    marks = [(at - bisect_left(dropped, at), label) for at, label in recorder.marks]
    starts = [place for place, (_, label) in enumerate(marks) if label == "forward"]
    found = []
    for first, stop in pairwise([*starts, len(marks) - 1]):
        begin, end = marks[first][0], marks[stop][0]
        stretch, numbers = _renumbered(events[begin:end])
        found.append(
            {
                "events": stretch,
                "sizes": [recorder.sizes[number] for number in numbers],
                "kinds": [kinds[number] for number in numbers],
                "gradients": {
                    gradients[number]: place
                    for place, number in enumerate(numbers)
                    if number in gradients
                },
                "marks": [(at - begin, label) for at, label in marks[first:stop]],
                "works": [sorted(each.items()) for each in recorder.works[first:stop]],
                "hosts": [dict(each) for each in recorder.hosts[first:stop]],
            }
        )
    return found


def _renumbered(events: Sequence[int]) -> tuple[list[int], list[int]]:
    """Births and deaths of what is born in a stretch, and which storages those are.

    >>> _renumbered([7, ~3, 9, ~7, ~9])
    ([0, 1, -1, -2], [7, 9])
    """
    place: dict[int, int] = {}
    out = []
    for event in events:
        if event >= 0:
            place[event] = len(place)
            out.append(place[event])
        elif ~event in place:
            out.append(~place[~event])
    return out, list(place)
