"""The order of training: which rows make which step, for every epoch and every rank.

A step is known by (epoch, index) alone, so training resumes there without replaying what came
before. The rows of a step do not depend on how many ranks or passes share it. Rows are packed
once; each epoch shuffles them. The last step of an epoch is filled up with empty rows, so that
shapes stay fixed and no example is left out.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from sftplan.data.collate import MicroBatch, Shape, collate
from sftplan.data.pack import pack
from sftplan.data.store import counts
from sftplan.facts.workload import padded_row_len
from sftplan.step.batch import in_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sftplan.data.mask import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How the rows of a step are shared out."""

    micro_batch: int  # rows per forward pass of one rank
    accumulation: int = 1  # forward passes per step and rank
    world_size: int = 1

    @property
    def rows_per_step(self) -> int:
        """Rows over all ranks and passes."""
        return self.micro_batch * self.accumulation * self.world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step; the counts are over all ranks and passes, known before it begins."""

    epoch: int
    index: int  # within the epoch
    num_targets: int  # divide the summed loss by this
    num_tokens: int  # without padding
    num_examples: int
    micro_batches: tuple[MicroBatch, ...]  # of this rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Rows of examples and their order. Make one with `batches`."""

    examples: Sequence[Example]
    rows: tuple[tuple[int, ...], ...]
    row_targets: tuple[int, ...]
    row_tokens: tuple[int, ...]
    row_len: int  # every row is padded to this
    seed: int
    sharing: Sharing
    epochs: float
    train_on_prompt: bool
    pad_id: int
    least_targets: int = 1  # places for so many, whatever comes
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self._shape())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the last one perhaps with empty rows."""
        return -(-len(self.rows) // self.sharing.rows_per_step)

    def step(self, epoch: int, index: int, *, rank: int = 0) -> Step:
        """Step `index` of `epoch` as `rank` sees it."""
        rows = self._step_rows(epoch, index)
        share = self.sharing
        micro_batches = []
        for number in range(share.accumulation):
            start = (number * share.world_size + rank) * share.micro_batch
            chosen = [self.rows[row] for row in rows[start : start + share.micro_batch]]
            micro_batches.append(self._collate(chosen))
        return Step(
            epoch=epoch,
            index=index,
            num_targets=sum(self.row_targets[row] for row in rows),
            num_tokens=sum(self.row_tokens[row] for row in rows),
            num_examples=sum(len(self.rows[row]) for row in rows),
            micro_batches=tuple(micro_batches),
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; a fraction of an epoch rounds up to a step."""
        return math.ceil(self.epochs * self.steps_per_epoch - 1e-9)

    def steps(self, *, start: tuple[int, int] = (0, 0), rank: int = 0) -> Iterator[Step]:
        """Steps from (epoch, index) `start` to the end of the run."""
        epoch, index = start
        for number in range(epoch * self.steps_per_epoch + index, self.num_steps):
            yield self.step(*divmod(number, self.steps_per_epoch), rank=rank)

    def heaviest(self) -> MicroBatch:
        """The micro-batch of the run with the most targets, then the most tokens."""

        def weight(rows: Sequence[int]) -> tuple[int, int]:
            targets = sum(self.row_targets[row] for row in rows)
            return targets, sum(self.row_tokens[row] for row in rows)

        rows = max(self._micro_batch_rows(), key=weight)
        return self._collate([self.rows[row] for row in rows])

    def _collate(self, rows: Sequence[Sequence[int]]) -> MicroBatch:
        return collate(
            self.examples,
            rows,
            self.shape,
            pad_id=self.pad_id,
            train_on_prompt=self.train_on_prompt,
        )

    def _step_rows(self, epoch: int, index: int) -> list[int]:
        order = shuffled(len(self.rows), self.seed, epoch)
        size = self.sharing.rows_per_step
        return list(order[index * size : (index + 1) * size])

    def _micro_batch_rows(self) -> Iterator[list[int]]:
        """The rows of every micro-batch of the run: the same however they are shared out."""
        size = self.sharing.micro_batch
        for number in range(self.num_steps):
            rows = self._step_rows(*divmod(number, self.steps_per_epoch))
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def _shape(self) -> Shape:
        """The smallest shape that holds every micro-batch of the run."""
        targets, documents = self.least_targets, 1
        for rows in self._micro_batch_rows():
            targets = max(targets, sum(self.row_targets[row] for row in rows))
            documents = max(documents, sum(len(self.rows[row]) for row in rows))
        return Shape(
            rows=self.sharing.micro_batch,
            row_len=self.row_len,
            target_capacity=in_tiles(targets),
            document_capacity=documents + self.sharing.micro_batch,  # and each row's padding
        )


def batches(
    examples: Sequence[Example],
    *,
    seq_len: int,
    sharing: Sharing,
    packing: bool,
    epochs: float = 1.0,
    seed: int = 0,
    row_len: int | None = None,
    train_on_prompt: bool = False,
    pad_id: int = 0,
    least_targets: int = 1,
) -> Batches:
    """Rows of at most `seq_len` tokens, packed or of one example each.

    Args:
        examples: None longer than `seq_len` tokens.
        seq_len: Longest row.
        sharing: How a step is shared out.
        packing: Several examples in one row.
        epochs: Passes over the data.
        seed: Of the order.
        row_len: Padded length of every row; by default `seq_len` with packing, else the longest
            example, up to a multiple of 64.
        train_on_prompt: Every token but each example's first is a target.
        pad_id: Token id of padding; it is masked by position, never by id.
        least_targets: Places that a micro-batch has for targets, at the least.
    """
    lengths, trained = counts(examples)
    order = shuffled(len(examples), seed, -1)
    if packing:
        packed = pack([lengths[index] for index in order], seq_len)
        rows = tuple(tuple(order[at] for at in row) for row in packed)
    else:
        rows = tuple((index,) for index in range(len(examples)))
    targets = [length - 1 for length in lengths] if train_on_prompt else trained
    longest = seq_len if packing else padded_row_len(max(lengths), seq_len)
    return Batches(
        examples=examples,
        rows=rows,
        row_targets=tuple(sum(targets[index] for index in row) for row in rows),
        row_tokens=tuple(sum(lengths[index] for index in row) for row in rows),
        row_len=longest if row_len is None else row_len,
        seed=seed,
        sharing=sharing,
        epochs=epochs,
        train_on_prompt=train_on_prompt,
        pad_id=pad_id,
        least_targets=least_targets,
    )


def split(num_examples: int, *, fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices to train on and to evaluate on, both in the file's order.

    >>> train, held_out = split(10, fraction=0.2)
    >>> len(train), len(held_out), sorted(train + held_out) == list(range(10))
    (8, 2, True)
    """
    held_out = set(shuffled(num_examples, seed, -2)[: round(num_examples * fraction)])
    return [i for i in range(num_examples) if i not in held_out], sorted(held_out)


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation that depends on nothing but its arguments.

    Sorted by `random()`, whose sequence Python promises never to change; `shuffle` promises less.
    """
    generator = random.Random(f"{seed}/{epoch}")
    keys = [generator.random() for _ in range(count)]
    return tuple(sorted(range(count), key=keys.__getitem__))
