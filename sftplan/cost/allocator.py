"""PyTorch's caching allocator, replayed: how much memory a step reserves.

Rules and constants of c10/cuda/CUDACachingAllocator.cpp: sizes are rounded to 512 bytes; blocks up to 1 MiB come
from a small pool, others from a large one; the best fit is taken, and split where enough remains. A block serves
the stream that it was taken on: each stream has pools of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.cost.blocks import (
    ADDRESS_BITS,
    SMALL_BYTES,
    Block,
    Pool,
    has_room,
    round_size,
    segment_size,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Set


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
        self.small = Pool(small=True, expandable=expandable)
        self.large = Pool(small=False, expandable=expandable)
        self.live: dict[int, Block] = {}
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self._lowest_address = 1 << ADDRESS_BITS

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
            self._absorb(block, after)
        pool.add(block)
        return size

    def _absorb(self, block: Block, after: Block) -> None:
        block.size += after.size
        block.next = after.next
        if after.next is not None:
            after.next.previous = block
        if block.pool.tail is after:
            block.pool.tail = block

    def _cut(self, block: Block, size: int) -> Block:
        """The rest of a block that keeps `size`."""
        rest = Block(block.address + size, block.size - size, block.pool)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = size
        if block.pool.tail is block:
            block.pool.tail = rest
        return rest

    def _split(self, block: Block, size: int) -> None:
        rest = self._cut(block, size)
        rest.free = True
        block.pool.add(rest)

    def _segment(self, pool: Pool, size: int) -> Block:
        """A segment of its own, below all others: cudaMalloc hands addresses out downwards.

        It counts where free blocks are of one size: the lowest is taken. From the addresses in an allocator
        trace of an H200 (driver 580, 2026-11-27).
        """
        size = segment_size(size)
        self._lowest_address -= size
        self.reserved_bytes += size
        return Block(self._lowest_address, size, pool)

    def release(self) -> None:
        """Give back what is free: whole segments, or whole pages of an expandable one.

        torch.cuda.empty_cache
        """
        for pool in (self.small, self.large):
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(pool, block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def _unmap(self, pool: Pool, block: Block) -> None:
        start = -(-block.address // pool.unit) * pool.unit
        stop = (block.address + block.size) // pool.unit * pool.unit
        if stop <= start:
            return
        self.reserved_bytes -= stop - start
        pool.remove(block)
        if start > block.address:
            rest = self._cut(block, start - block.address)
            pool.add(block)
            block = rest
        if stop < block.address + block.size:
            self._split(block, stop - block.address)
        if block is pool.tail:
            pool.tail = block.previous
            if block.previous is not None:
                block.previous.next = None
            return
        pool.add_gap(block)

    def _grow(self, pool: Pool, size: int) -> Block:
        """Map whole pages at the lowest addresses with room, else behind the end of the pool's only segment."""
        for gap in pool.unmapped:
            before = gap.previous
            first = before if before is not None and before.free else gap
            if has_room(first, size):
                return self._map(pool, first, size)
        tail = pool.tail
        if tail is not None and tail.free:
            return self._map(pool, tail, size)
        block = Block(0 if tail is None else tail.address + tail.size, 0, pool)
        block.previous = tail
        if tail is not None:
            tail.next = block
        pool.tail = block
        self._lengthen(block, size)
        return block

    def _lengthen(self, block: Block, size: int) -> None:
        """The last block of a segment, by whole pages."""
        added = -(-(size - block.size) // block.pool.unit) * block.pool.unit
        block.size += added
        self.reserved_bytes += added

    def _map(self, pool: Pool, block: Block, size: int) -> Block:
        """A block of at least `size` from one that is free or without memory, and what follows it."""
        if block.mapped:
            pool.remove(block)
        else:
            self._fill(pool, block, size)
        while block.size < size:
            after = block.next
            if after is None:  # the end: as far as it takes
                self._lengthen(block, size)
                break
            if after.mapped:
                pool.remove(after)
            else:
                self._fill(pool, after, size - block.size)
            self._absorb(block, after)
        return block

    def _fill(self, pool: Pool, gap: Block, size: int) -> None:
        """Memory for the first pages of a gap."""
        mapped = min(gap.size, -(-size // pool.unit) * pool.unit)
        pool.unmapped.remove(gap)
        if mapped < gap.size:
            pool.add_gap(self._cut(gap, mapped))
        gap.mapped = True
        self.reserved_bytes += mapped


def replay(
    events: Sequence[int],
    sizes: Sequence[int],
    *,
    expandable: bool,
    streams: Sequence[str] | None = None,
    emptied_at: Sequence[int] = (),
    passing: Set[int] = frozenset(),
    counted_from: int = 0,
) -> Replay:
    """Run a tape's events through the allocator: n is the birth of storage n, ~n its death.

    `streams` names for each storage the stream that takes it; without, all are on one. Before the events
    `emptied_at` the cache is emptied: the reserve of the building, before the first, counts in no peak. What is
    `passing` has its place but counts in none either, and nothing does before event `counted_from`.
    """
    names = set(streams or ("",))
    pools = {name: CachingAllocator(expandable=expandable) for name in names}
    of = [pools[name] for name in streams or [""] * len(sizes)]
    allocated = peak_allocated = peak_event = reserved = 0
    for position, event in enumerate(events):
        if position in emptied_at:
            if position != emptied_at[0]:
                reserved = max(reserved, _reserved_bytes(pools.values()))
            for allocator in pools.values():
                allocator.release()
        if event >= 0:
            if sizes[event]:
                taken = of[event].malloc(event, sizes[event])
                allocated += 0 if event in passing else taken
                if allocated > peak_allocated and position >= counted_from:
                    peak_allocated, peak_event = allocated, position
        elif sizes[~event]:
            given = of[~event].free(~event)
            allocated -= 0 if ~event in passing else given
    reserved = max(reserved, peak_allocated, _reserved_bytes(pools.values()))
    return Replay(peak_allocated, reserved, peak_event)


def _reserved_bytes(allocators: Iterable[CachingAllocator]) -> int:
    return sum(allocator.reserved_bytes for allocator in allocators)
