"""Several examples in one row: best-fit decreasing bin packing.

References:
    [JOHNSON] Johnson, Demers, Ullman, Garey, Graham 1974, "Worst-case performance bounds for
              simple one-dimensional packing algorithms": at most 11/9 of the best number of rows,
              plus a constant.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of example indices, none longer than `seq_len` tokens; deterministic.

    Longest first, each into the fullest row that has room: O(n log n). Equal lengths keep their
    order, so a shuffled input gives other company to each example.

    >>> pack([5, 3, 8, 2, 2], seq_len=10)
    [[2, 4], [0, 1, 3]]
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}  # room in tokens -> rows with exactly that room
    rooms: list[int] = []  # the keys that have rows, ascending: at most seq_len of them
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 0 < length <= seq_len:
            message = f"example {index} has {length} tokens, a row has 1 to {seq_len}"
            raise ValueError(message)
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[at]
        rows[row].append(index)
        room -= length
        if not rows_by_room.setdefault(room, []):
            insort(rooms, room)
        rows_by_room[room].append(row)
    return rows


def fill_fraction(lengths: Sequence[int], num_rows: int, seq_len: int) -> float:
    """Share of the rows' tokens that hold examples.

    >>> fill_fraction([5, 3, 8, 2, 2], num_rows=2, seq_len=10)
    1.0
    """
    return sum(lengths) / (num_rows * seq_len) if num_rows else 0.0
