"""What CUDA's caching allocator holds while a step's storages come and go: its rules, replayed without a card.

PyTorch asks the driver for segments and cuts blocks out of them. A segment goes back only when the card is full and
nothing in it is used, so a process holds more than its tensors take: blocks that activations have left do not fit a
larger tensor, and a new segment is taken for that.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from poetx.memory.tracker import Record

_MIB = 1 << 20
_ROUND = 512
_SMALL = _MIB  # up to here: the pool of small blocks
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB  # for blocks below 10 MiB; larger ones get a segment of their own, in steps of 2 MiB
_OWN_SEGMENT = 10 * _MIB
_STEP = 2 * _MIB


class OutOfMemory(Exception):
    """The card is too small."""


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment, between its neighbours."""

    address: int
    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    used: bool = True


class CachingAllocator:
    """The rules of PyTorch's CUDA allocator in its default settings: two pools, best fit, split and merge.

    Args:
        card: bytes that the driver has to give.

    Attributes:
        reserved, peak: bytes in segments, now and at most.
    """

    def __init__(self, card: float = math.inf) -> None:
        self.reserved = self.peak = 0
        self._card, self._next_address = card, 0
        # (size, address, block), sorted: the best fit, and of equals the lowest
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> Block:
        """A block of at least ``size`` bytes. Raises OutOfMemory."""
        size = max(_ROUND, size + -size % _ROUND)
        small = size <= _SMALL
        free = self._free[small]
        index = bisect.bisect_left(free, (size, -1))
        block = free.pop(index)[2] if index < len(free) else self._segment(size, small)
        block.used = True
        rest = block.size - size
        if rest >= _ROUND if small else rest > _SMALL:
            tail = Block(block.address + size, rest, small, block, block.after)
            if block.after:
                block.after.before = tail
            block.after, block.size = tail, size
            self._put(tail)
        return block

    def release(self, block: Block) -> None:
        """The block is free again, one with free neighbours."""
        for other in (block.before, block.after):
            if other and not other.used:
                self._take(other)
                block.size += other.size
                if other is block.before:
                    block.address, block.before = other.address, other.before
                    if other.before:
                        other.before.after = block
                else:
                    block.after = other.after
                    if other.after:
                        other.after.before = block
        self._put(block)

    def _segment(self, size: int, small: bool) -> Block:
        wanted = _SMALL_SEGMENT if small else _LARGE_SEGMENT if size < _OWN_SEGMENT else size + -size % _STEP
        if self.reserved + wanted > self._card:
            self._give_back()
        if self.reserved + wanted > self._card:
            raise OutOfMemory
        self.reserved += wanted
        self.peak = max(self.peak, self.reserved)
        self._next_address += wanted
        return Block(self._next_address - wanted, wanted, small)

    def _give_back(self) -> None:
        """Segments that are one free block go back to the driver."""
        for small, free in self._free.items():
            kept = [entry for entry in free if entry[2].before or entry[2].after]
            self.reserved -= sum(entry[0] for entry in free) - sum(entry[0] for entry in kept)
            self._free[small] = kept

    def _put(self, block: Block) -> None:
        block.used = False
        bisect.insort(self._free[block.small], (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect.bisect_left(free, (block.size, block.address))]


def replay(records: Iterable[Record], *, card: float = math.inf, steps: int = 3) -> int:
    """Bytes held at most over a few steps: parameters first, optimizer state from the first ``optimizer.step()`` on.

    Raises:
        OutOfMemory: more than ``card`` bytes are needed at once.
    """
    allocator = CachingAllocator(card)
    kept, passing = [], []
    for record in records:
        (passing if record.phase else kept).append(record)
    state = [record for record in kept if record.category == "optimizer"]
    for record in kept:
        if record.category != "optimizer":
            allocator.allocate(record.size)
    events = sorted(_events(passing))
    blocks: dict[int, Block] = {}
    for _ in range(steps):
        for _, begins, index in events:
            if begins:
                if passing[index].phase == "step":
                    while state:
                        allocator.allocate(state.pop(0).size)
                blocks[index] = allocator.allocate(passing[index].size)
            else:
                allocator.release(blocks.pop(index))
        for block in blocks.values():
            allocator.release(block)
        blocks.clear()
    return allocator.peak


def _events(records: Sequence[Record]) -> Iterable[tuple[int, bool, int]]:
    for index, record in enumerate(records):
        yield record.born, True, index
        if record.died is not None:
            yield record.died, False, index
