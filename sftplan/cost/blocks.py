"""Blocks of PyTorch's caching allocator, and the free ones of a pool.

Rules and constants of c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from sftplan.units import MIB

MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_BYTES = 1 * MIB  # kSmallSize: up to here the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer: a segment for requests under kMinLargeAlloc
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here a segment of its own
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge

ADDRESS_BITS = 48


class Block:
    """A stretch of addresses: taken, free, or (not `mapped`) without memory; neighbours are of its segment."""

    __slots__ = ("address", "free", "mapped", "next", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: Pool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.free = False
        self.mapped = True
        self.previous: Block | None = None
        self.next: Block | None = None


class Pool:
    """Free blocks by size and address; `tail` is the end of an expandable segment.

    `unmapped` are the parts of it, by address, whose pages were given back: addresses without memory.
    """

    __slots__ = ("blocks", "keys", "small", "split_above", "tail", "unit", "unmapped")

    def __init__(self, *, small: bool, expandable: bool) -> None:
        self.small = small
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.tail: Block | None = None
        self.unmapped: list[Block] = []
        self.unit = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self.split_above = MIN_BLOCK_BYTES - 1 if small or expandable else SMALL_BYTES

    def add(self, block: Block) -> None:
        """A block is free."""
        key = block.size << ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        """A free block is so no more."""
        key = block.size << ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def add_gap(self, block: Block) -> None:
        """A block has no memory."""
        block.free = block.mapped = False
        insort(self.unmapped, block, key=lambda each: each.address)

    def best_fit(self, size: int, *, expandable: bool) -> Block | None:
        """The smallest free block that holds `size`; one that can grow is as large as it may become."""
        position = bisect_left(self.keys, size << ADDRESS_BITS)
        if position == len(self.keys):
            return None
        block = self.blocks[self.keys[position]]
        if not expandable or (block is not self.tail and not self.unmapped):
            return block
        for larger in range(position + 1, len(self.keys)):
            beside = self.blocks[self.keys[larger]]
            if self.room(beside) >= self.room(block):
                break
            block = beside
        return block

    def room(self, block: Block) -> float:
        """Bytes of a free block with the gap behind it."""
        if block is self.tail:
            return float("inf")
        after = block.next
        return block.size + (after.size if after is not None and not after.mapped else 0)


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


def has_room(block: Block | None, size: int) -> bool:
    """Whether what is free or without memory from a block on holds `size`; the end of a segment does."""
    room = 0
    while room < size and block is not None:
        if block.mapped and not block.free:
            return False
        room += block.size
        block = block.next
    return True
