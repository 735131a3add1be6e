"""Which pages of one arena are away, and the digest of each: the books of away pages.

The truth is the agent's list. These books follow it: by what it announces, and by the outcomes of
orders, applied in the order of its messages. So a page may be away in the books and not in the
arena (the application discarded it, and the order that would tell is still to come), but never the
other way round: what the books do not list, nobody needs to keep.

Both arrays are reservations that cost memory only near pages that are, or were, away: 33 bytes
each. A block that has none any more gives its memory back.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage_merger.runs import Int64s, index

Bytes = bytes | bytearray | memoryview
Digests = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

#: Pages, so that the digests of a block are whole pages of memory, and its marks too.
_BLOCK_SHIFT = 16
_BLOCK_PAGES = 1 << _BLOCK_SHIFT
_MAP_NORESERVE = 0x4000


def no_digests(count: int = 0) -> Digests:
    """Return so many digests, all of them zero."""
    return np.zeros((count, wire.DIGEST_BYTES), np.uint8)


def digests_of(records: npt.NDArray[np.void]) -> Digests:
    """Return the digests of records of wire.AWAY."""
    return np.ascontiguousarray(records["digest"]).view(np.uint8).reshape(-1, wire.DIGEST_BYTES)


class AwayMap:
    """The away pages of an arena.

    Attributes:
        pages: size of the arena.
        away: how many pages are away.

    Raises:
        MemoryError: there is no address space for so many pages.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.away = 0
        try:
            self._digest_memory = _reserve(pages * wire.DIGEST_BYTES)
            self._mark_memory = _reserve(pages)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no address space for the books of {pages} away pages") from error
        self._digests = np.frombuffer(self._digest_memory, np.uint8, pages * wire.DIGEST_BYTES)
        self._digests = self._digests.reshape(pages, wire.DIGEST_BYTES)
        self._marks = np.frombuffer(self._mark_memory, np.bool_, pages)
        self._in_block = np.zeros(-(-pages // _BLOCK_PAGES), np.int32)

    def contains(self, pages: Int64s) -> Mask:
        """Return whether each page is away."""
        marks: Mask = self._marks[index(pages)].copy()
        return marks

    def digests(self, pages: Int64s) -> Digests:
        """Return the digests of pages that are away."""
        digests: Digests = self._digests[index(pages)].copy()
        return digests

    def add(self, pages: Int64s, digests: Digests) -> None:
        """Pages (each named once) are away now, or have another digest."""
        at = index(pages)
        new = pages[~self._marks[at]]
        self._marks[at] = True
        self._digests[at] = digests
        np.add.at(self._in_block, new >> _BLOCK_SHIFT, 1)
        self.away += new.size

    def remove(self, pages: Int64s) -> int:
        """Pages (each named once) are not away any more; return how many were."""
        if not self.away:
            return 0
        gone = pages[self._marks[index(pages)]]
        self._marks[index(gone)] = False
        blocks = gone >> _BLOCK_SHIFT
        np.subtract.at(self._in_block, blocks, 1)
        self.away -= gone.size
        for block in np.unique(blocks[self._in_block[blocks] == 0]).tolist():
            self._give_back(block)
        return gone.size

    def clear(self) -> None:
        """No page is away any more."""
        self.remove(self.all())

    def within(self, first: Int64s, count: Int64s) -> Int64s:
        """Return the away pages of ranges that lie within the arena, in the ranges' order."""
        parts = [
            self._in_range(low, low + length)
            for low, length in zip(first.tolist(), count.tolist(), strict=True)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def all(self) -> Int64s:
        """Return every away page, ascending."""
        return self._in_range(0, self.pages)

    def _in_range(self, low: int, high: int) -> Int64s:
        if not self.away:
            return np.empty(0, np.int64)
        first = low >> _BLOCK_SHIFT
        blocks = np.flatnonzero(self._in_block[first : -(-high // _BLOCK_PAGES)]) + first
        parts = [np.empty(0, np.int64)]
        for block in blocks.tolist():
            start = max(low, block << _BLOCK_SHIFT)
            end = min(high, (block + 1) << _BLOCK_SHIFT)
            parts.append(np.flatnonzero(self._marks[start:end]) + start)
        return np.concatenate(parts)

    def _give_back(self, block: int) -> None:
        first = block << _BLOCK_SHIFT
        count = min(_BLOCK_PAGES, self.pages - first)
        size = wire.DIGEST_BYTES
        self._digest_memory.madvise(mmap.MADV_DONTNEED, first * size, count * size)
        self._mark_memory.madvise(mmap.MADV_DONTNEED, first, count)


class Pins:
    """Digests that are kept besides those of away pages: of work and orders under way."""

    def __init__(self) -> None:
        self._pins: dict[int, Digests] = {}
        self._next = itertools.count(1)
        self._recent: list[Digests] = []

    def keep(self, digests: Digests) -> int:
        """Keep digests until the pin returned is released."""
        pin = next(self._next)
        self._pins[pin] = digests
        self.note(digests)
        return pin

    def note(self, digests: Digests) -> None:
        """Digests are needed from now on, for another reason than a pin."""
        self._recent.append(digests)

    def recent(self) -> Digests:
        """Return what came to be needed since `forget_recent`."""
        return np.concatenate([no_digests(), *self._recent])

    def forget_recent(self) -> None:
        """Begin to note anew."""
        self._recent.clear()

    def release(self, pin: int) -> None:
        """End a pin; one that ended before is no error."""
        self._pins.pop(pin, None)

    @contextlib.contextmanager
    def kept(self, digests: Digests) -> Iterator[None]:
        """Keep digests for as long as the block runs."""
        pin = self.keep(digests)
        try:
            yield
        finally:
            self.release(pin)

    def all(self) -> Digests:
        """Return what is pinned."""
        return np.concatenate([no_digests(), *self._pins.values()])


def _reserve(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
