"""The host waits for a block that began AHEAD_BLOCKS before, and for no other."""

# ruff: noqa: TID253
from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sftplan.facts.buckets import AHEAD_BLOCKS
from sftplan.train.ahead import RunAhead


class Marks:
    """Marks in the work of a GPU that is not here: what is done with them is written down."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self._numbers = count()

    def __call__(self) -> Any:
        number = next(self._numbers)
        return SimpleNamespace(
            record=lambda: self.log.append(("begun", number)),
            synchronize=lambda: self.log.append(("waited", number)),
        )


def test_each_block_waits_for_the_one_two_before_over_passes() -> None:
    blocks = [torch.nn.Linear(2, 2) for _ in range(3)]
    marks = Marks()
    RunAhead(blocks, marks)
    for _ in range(2):
        x = torch.ones(1, 2)
        for block in blocks:
            x = block(x)
    expected: list[tuple[str, int]] = []
    for number in range(6):
        expected.append(("begun", number))
        if number >= AHEAD_BLOCKS:
            expected.append(("waited", number - AHEAD_BLOCKS))
    assert marks.log == expected


def test_a_checkpointed_block_that_runs_again_counts_again() -> None:
    block, marks = torch.nn.Linear(2, 2), Marks()
    RunAhead([block], marks)
    x = torch.ones(1, 2, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert [what for what, _ in marks.log] == ["begun", "begun"]
