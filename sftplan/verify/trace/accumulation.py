"""Gradients that the engine adds in place: under a dispatch mode it makes a new tensor instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def added_in_place(
    events: Sequence[int], sums: Sequence[tuple[int, int, int]]
) -> tuple[list[int], dict[int, int], list[int]]:
    """The events as they are without the mode, whose storage each vanished sum is, and where events went.

    `sums` are (position of the birth, number of the sum, number of the first addend). Where the first
    addend dies before anything else is born, nothing else held it: the engine adds into it
    (accumulate in torch/csrc/autograd/input_buffer.cpp, accumulateGrad in accumulate_grad.h).

    >>> added_in_place([0, 1, 2, ~0, ~1, ~2], [(2, 2, 0)])
    ([0, 1, -2, -1], {2: 0}, [2, 3])
    """
    dropped: set[int] = set()
    owner: dict[int, int] = {}
    for position, number, first in sums:
        following = position + 1
        while following < len(events) and events[following] < 0:
            if events[following] == ~first:
                dropped |= {position, following}
                owner[number] = first
                break
            following += 1
    kept = []
    for position, event in enumerate(events):
        if position in dropped:
            continue
        number = root(owner, event if event >= 0 else ~event)
        kept.append(number if event >= 0 else ~number)
    return kept, owner, sorted(dropped)


def root(owner: dict[int, int], number: int) -> int:
    """The storage that a number stands for in the end.

    >>> root({2: 1, 1: 0}, 2)
    0
    """
    while number in owner:
        number = owner[number]
    return number
