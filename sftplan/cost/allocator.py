"""PyTorch's caching allocator, replayed: how much memory a step reserves.

Rules and constants of c10/cuda/CUDACachingAllocator.cpp: sizes are rounded to 512 bytes; blocks up to 1 MiB come
from a small pool, others from a large one; the best fit is taken, and split where enough remains. A block serves
the stream that it was taken on: each stream has pools of its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_BYTES = 1 * MIB  # kSmallSize: up to here the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer: a segment for requests under kMinLargeAlloc
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here a segment of its own
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge

_ADDRESS_BITS = 48


class _Block:
    __slots__ = ("address", "free", "next", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: _Pool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.free = False
        self.previous: _Block | None = None
        self.next: _Block | None = None


class _Pool:
    """Free blocks by size and address; `tail` is the end of an expandable segment."""

    __slots__ = ("blocks", "keys", "small", "split_above", "tail", "unit")

    def __init__(self, *, small: bool, expandable: bool) -> None:
        self.small = small
        self.keys: list[int] = []
        self.blocks: dict[int, _Block] = {}
        self.tail: _Block | None = None
        self.unit = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self.split_above = MIN_BLOCK_BYTES - 1 if small or expandable else SMALL_BYTES

    def add(self, block: _Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: _Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def best_fit(self, size: int, *, expandable: bool) -> _Block | None:
        """The smallest free block that holds `size`; an expandable tail only where nothing else does."""
        position = bisect_left(self.keys, size << _ADDRESS_BITS)
        if position == len(self.keys):
            return None
        block = self.blocks[self.keys[position]]
        if expandable and block is self.tail and position + 1 < len(self.keys):
            return self.blocks[self.keys[position + 1]]
        return block


def round_size(num_bytes: int) -> int:
    """A request in whole 512-byte units.

    >>> round_size(1), round_size(512), round_size(2561)
    (512, 512, 3072)
    """
    return max(MIN_BLOCK_BYTES, -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


def segment_size(size: int) -> int:
    """What is asked of the driver for a block of `size` when nothing cached fits.

    >>> [segment_size(n * MIB) // MIB for n in (1, 2, 9, 10, 25)]
    [2, 20, 20, 10, 26]
    """
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


@dataclass(frozen=True, slots=True)
class Replay:
    """Peaks of a replay in bytes, and at which event the allocated peak is."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_event: int


class CachingAllocator:
    """The allocator's state: what is live, what is cached, what is reserved."""

    def __init__(self, *, expandable: bool) -> None:
        self.expandable = expandable
        self.small = _Pool(small=True, expandable=expandable)
        self.large = _Pool(small=False, expandable=expandable)
        self.live: dict[int, _Block] = {}
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self._next_address = 0

    def malloc(self, key: int, num_bytes: int) -> int:
        """Serve a request; the size of the block it gets."""
        size = round_size(num_bytes)
        pool = self.small if size <= SMALL_BYTES else self.large
        block = pool.best_fit(size, expandable=self.expandable)
        if block is None:
            block = self._grow(pool, size) if self.expandable else self._segment(pool, size)
        else:
            pool.remove(block)
        if block.size - size > pool.split_above:
            self._split(block, size)
        block.free = False
        self.live[key] = block
        self.allocated_bytes += block.size
        return block.size

    def free(self, key: int) -> int:
        """Give a block back to its pool, joined with its free neighbours; the size that it had."""
        block = self.live.pop(key)
        size = block.size
        self.allocated_bytes -= size
        block.free = True
        pool = block.pool
        before, after = block.previous, block.next
        if before is not None and before.free:
            pool.remove(before)
            block.address = before.address
            block.size += before.size
            block.previous = before.previous
            if before.previous is not None:
                before.previous.next = block
        if after is not None and after.free:
            pool.remove(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.previous = block
            if pool.tail is after:
                pool.tail = block
        pool.add(block)
        return size

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.pool)
        rest.free = True
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = size
        if block.pool.tail is block:
            block.pool.tail = rest
        block.pool.add(rest)

    def _segment(self, pool: _Pool, size: int) -> _Block:
        block = _Block(self._next_address, segment_size(size), pool)
        self._next_address += block.size
        self.reserved_bytes += block.size
        return block

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """Map whole pages behind the end of the pool's only segment."""
        tail = pool.tail
        have = tail.size if tail is not None and tail.free else 0
        added = -(-(size - have) // pool.unit) * pool.unit
        self.reserved_bytes += added
        if tail is not None and have:
            pool.remove(tail)
            tail.size += added
            return tail
        block = _Block(0 if tail is None else tail.address + tail.size, added, pool)
        block.previous = tail
        if tail is not None:
            tail.next = block
        pool.tail = block
        return block


def replay(
    events: Sequence[int],
    sizes: Sequence[int],
    *,
    expandable: bool,
    streams: Sequence[str] | None = None,
) -> Replay:
    """Run a tape's events through the allocator: n is the birth of storage n, ~n its death.

    `streams` names for each storage the stream that takes it; without, all are on one.
    """
    names = set(streams or ("",))
    pools = {name: CachingAllocator(expandable=expandable) for name in names}
    of = [pools[name] for name in streams or [""] * len(sizes)]
    allocated = peak_allocated = peak_event = 0
    for position, event in enumerate(events):
        if event >= 0:
            if sizes[event]:
                allocated += of[event].malloc(event, sizes[event])
                if allocated > peak_allocated:
                    peak_allocated, peak_event = allocated, position
        elif sizes[~event]:
            allocated -= of[~event].free(~event)
    reserved = sum(allocator.reserved_bytes for allocator in pools.values())
    return Replay(peak_allocated, reserved, peak_event)
