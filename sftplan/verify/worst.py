"""The batches of a dry run: rows as the plan describes them, or those of the data itself.

Both go the way that training goes, through `sftplan.data.batches`: shapes, packing and padding are
its own, and the worst micro-batch is the one that it calls the heaviest.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from sftplan.data.batches import Sharing, batches
from sftplan.data.conversation import Place
from sftplan.data.mask import Example
from sftplan.plan.timeline import strategy_of, workload_of
from sftplan.step.batch import full_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.batches import Batches
    from sftplan.data.collate import MicroBatch
    from sftplan.facts.workload import LengthStatistics
    from sftplan.plan.record import Plan

SEED = 0
DISTINCT_STEPS = 2  # worth of rows that are made up; later steps take them again in another order
SPARE = 1.1  # times the examples that should fill them: drawn ones may turn out short


def made_up_batches(plan: Plan, *, num_steps: int, world_size: int) -> Batches:
    """Steps of random tokens with the lengths that the plan knows: full rows, if it knows none.

    The shape is the plan's, so that a few steps stand for the heaviest of a whole run.
    """
    strategy, work = plan.strategy, plan.inputs.workload
    sharing = Sharing(
        micro_batch=strategy.micro_batch, accumulation=strategy.accumulation, world_size=world_size
    )
    lengths = work.lengths
    rows = sharing.rows_per_step * DISTINCT_STEPS
    if lengths is None:
        totals, share = [work.seq_len] * rows, 1.0
    else:
        examples_per_row = 1.0
        if strategy.packing:
            room = work.seq_len * lengths.packed_fill_fraction
            examples_per_row = max(1.0, room / lengths.total_mean_tokens)
        count = math.ceil(rows * examples_per_row * SPARE)
        totals = drawn_lengths(lengths, count, longest=work.seq_len)
        share = lengths.response_mean_tokens / lengths.total_mean_tokens
    found = batches(
        made_up_examples(totals, share, plan.inputs.model.vocab_size),
        seq_len=work.seq_len, sharing=sharing, packing=strategy.packing, seed=SEED,
        train_on_prompt=work.train_on_prompt,
        least_targets=full_batch(strategy_of(plan.strategy), workload_of(plan)).num_targets,
    )  # fmt: skip
    found = first_rows(found, rows)
    return replace(found, epochs=math.ceil(num_steps / found.steps_per_epoch))


def first_rows(found: Batches, count: int) -> Batches:
    """No more rows than these, so that the last step is as full as a run's other steps."""
    return replace(
        found,
        rows=found.rows[:count],
        row_targets=found.row_targets[:count],
        row_tokens=found.row_tokens[:count],
    )


def drawn_lengths(lengths: LengthStatistics, count: int, *, longest: int) -> list[int]:
    """`count` lengths spread like those of the data; the longest of it is among them."""
    draw = random.Random(SEED)
    uppers = [upper for upper, _ in lengths.histogram] or [lengths.total_max_tokens]
    weights = [number for _, number in lengths.histogram] or [1]
    below = dict(pairwise([*reversed(uppers), 0]))
    most = min(longest, lengths.total_max_tokens)
    drawn = [
        min(most, max(2, draw.randint(below[upper] + 1, upper)))
        for upper in draw.choices(uppers, weights, k=count)
    ]
    drawn[0] = max(2, most)
    return drawn


def made_up_examples(
    totals: Sequence[int], response_share: float, vocab_size: int
) -> list[Example]:
    """Examples of random tokens; the last `response_share` of each is the response."""
    draw = random.Random(SEED)
    pool = array("i", draw.choices(range(vocab_size), k=2 * max(totals)))
    examples = []
    for number, total in enumerate(totals):
        trained = min(total - 1, max(1, round(total * response_share)))
        start = draw.randrange(len(pool) - total)
        examples.append(
            Example(
                input_ids=pool[start : start + total],
                trained=bytes(total - trained) + b"\1" * trained,
                place=Place(file="made up", row=number + 1),
            )
        )
    return examples


def worst_micro_batch(found: Batches) -> MicroBatch:
    """The micro-batch with the most targets, then the most tokens: at the shape of all of them."""
    return found.heaviest()
