"""Packing: every example once, no row too long, few rows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.data.pack import fill_fraction, pack


@given(lengths=st.lists(st.integers(1, 64), max_size=200), room=st.integers(0, 64))
def test_every_example_once_and_no_row_too_long(lengths: list[int], room: int) -> None:
    seq_len = max(lengths, default=1) + room
    rows = pack(lengths, seq_len)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= seq_len for total in totals)
    assert pack(lengths, seq_len) == rows
    # Two rows that fit into one would have been one: at most one row is half full.
    assert sum(2 * total <= seq_len for total in totals) <= 1
    best = -(-sum(lengths) // seq_len)
    assert 9 * len(rows) <= 11 * best * 2 + 9


def test_rows_of_typical_lengths_are_nearly_full() -> None:
    generator = random.Random(0)
    lengths = [min(int(generator.lognormvariate(5, 0.7)) + 1, 1024) for _ in range(20_000)]
    rows = pack(lengths, 1024)
    assert fill_fraction(lengths, len(rows), 1024) > 0.98


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_no_row_holds_are_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens"):
        pack([1, length], 10)
