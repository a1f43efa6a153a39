"""The allocator: its state stays whole whatever is asked of it, and giving back pages costs what it must."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.cost.allocator import CachingAllocator, replay
from sftplan.cost.blocks import LARGE_SEGMENT_BYTES, Block, Pool, round_size
from sftplan.units import MIB

OPERATIONS = st.lists(
    st.tuples(st.booleans(), st.integers(1, 90 * MIB), st.integers(0, 10**6)), max_size=60
)


def run(allocator: CachingAllocator, operations: list[tuple[bool, int, int]], first: int) -> None:
    """Take so much, or give back one of what is taken."""
    for number, (takes, size, which) in enumerate(operations, first):
        if takes or not allocator.live:
            allocator.malloc(number, size)
        else:
            allocator.free(sorted(allocator.live)[which % len(allocator.live)])


def segment(pool: Pool) -> list[Block]:
    """All blocks of an expandable one, in order."""
    found = []
    block = pool.tail
    while block is not None:
        found.append(block)
        block = block.previous
    return found[::-1]


@given(OPERATIONS, OPERATIONS, st.booleans())
def test_what_is_reserved_is_what_has_memory(
    before: list[tuple[bool, int, int]], after: list[tuple[bool, int, int]], expandable: bool
) -> None:
    allocator = CachingAllocator(expandable=expandable)
    run(allocator, before, 0)
    reserved, held = allocator.reserved_bytes, allocator.allocated_bytes
    allocator.release()
    assert held <= allocator.reserved_bytes <= reserved
    if not allocator.live:
        assert allocator.reserved_bytes == 0
    run(allocator, after, len(before))
    if not expandable:
        return
    mapped = 0
    for pool in (allocator.small, allocator.large):
        blocks = segment(pool)
        for block, following in pairwise(blocks):
            assert block.next is following
            assert block.address + block.size == following.address
            assert not (block.free and following.free)
        assert [b for b in blocks if b.free] == sorted(
            pool.blocks.values(), key=lambda b: b.address
        )
        assert [b for b in blocks if not b.mapped] == pool.unmapped
        assert all(b.size % pool.unit == b.address % pool.unit == 0 for b in pool.unmapped)
        mapped += sum(b.size for b in blocks if b.mapped)
    assert mapped == allocator.reserved_bytes


def test_a_gap_takes_memory_page_by_page() -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.malloc(0, 100 * MIB)
    allocator.malloc(1, 40 * MIB)
    allocator.free(0)
    allocator.release()
    assert allocator.reserved_bytes == 40 * MIB

    allocator.malloc(2, 30 * MIB)  # at the lowest addresses, not behind what is there
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.live[2].address == 0
    allocator.malloc(3, 65 * MIB)  # the 10 that are left there, and the other three pages
    assert allocator.reserved_bytes == 140 * MIB
    assert allocator.live[3].address == 30 * MIB
    allocator.malloc(4, 60 * MIB)
    assert allocator.live[4].address == 140 * MIB


def test_segments_go_whole_or_stay() -> None:
    allocator = CachingAllocator(expandable=False)
    allocator.malloc(0, 100 * MIB)
    allocator.malloc(1, 2 * MIB)  # of a segment of 20 MiB
    allocator.free(0)
    allocator.release()
    assert allocator.reserved_bytes == LARGE_SEGMENT_BYTES


def test_of_free_blocks_of_one_size_the_newest_segment_s_is_taken() -> None:
    allocator = CachingAllocator(expandable=False)
    for number in range(3):
        allocator.malloc(number, 32 * MIB)
    oldest, newest = (allocator.live[number].address for number in (0, 2))
    allocator.free(0)
    allocator.free(2)
    allocator.malloc(3, 32 * MIB)
    assert allocator.live[3].address == newest < oldest


@given(OPERATIONS)
def test_an_empty_cache_changes_nothing(operations: list[tuple[bool, int, int]]) -> None:
    sizes = [size for _, size, _ in operations]
    events = list(range(len(sizes)))
    for positions in ((), (0,), (len(events),)):
        assert replay(events, sizes, expandable=True, emptied_at=positions) == replay(
            events, sizes, expandable=True
        )


def test_the_reserve_of_the_building_does_not_count_and_that_of_every_step_does() -> None:
    sizes = [40 * MIB, 400 * MIB, 410 * MIB]
    events = [0, 1, ~1, 2, ~2, 1]  # the larger block finds no room where the smaller was
    built = replay(events, sizes, expandable=False, emptied_at=(5,))
    assert built.peak_reserved_bytes == built.peak_allocated_bytes == 450 * MIB
    step = replay(events, sizes, expandable=False, emptied_at=(1, 5))
    assert step.peak_reserved_bytes == 850 * MIB


@pytest.mark.parametrize("size", [1, 512, 513, 3 * MIB + 1])
def test_sizes_are_rounded_up(size: int) -> None:
    assert size <= round_size(size) < size + 512
