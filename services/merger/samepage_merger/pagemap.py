"""Which slot each page of one arena maps.

The array is a reservation that costs memory only where a page was ever shared, so that an arena
of any size costs nothing by itself. Numbers take 4 bytes a page until the store has given 2**32
slots (16 TiB), and 8 from then on.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from samepage_merger.runs import Int64s, index

#: What a page maps that maps no slot: slot 0 is never given.
PRIVATE = 0

_BLOCK_SHIFT = 16
_BLOCK_PAGES = 1 << _BLOCK_SHIFT
_NARROW_MAX = 2**32 - 1
_MAP_NORESERVE = 0x4000


class PageMap:
    """The slots of an arena's pages.

    Attributes:
        pages: size of the arena.
        shared: how many pages map a slot.
        mappings: of how many mappings the kernel makes the arena up: neighbours share one when
            both are private, or map neighbouring slots.

    Raises:
        MemoryError: there is no address space for so many pages.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.shared = 0
        self.mappings = 1
        self._slots: npt.NDArray[np.unsignedinteger] = _reserve(pages, np.dtype(np.uint32))
        blocks = -(-pages // _BLOCK_PAGES)
        self._in_block = np.zeros(blocks, np.int32)

    def slots(self, pages: Int64s) -> Int64s:
        """Return the slot of each page, PRIVATE where it maps none."""
        return self._slots[index(pages)].astype(np.int64)

    def put(self, pages: Int64s, slots: Int64s) -> Int64s:
        """Let each page (named once) map its slot, or none; return what they mapped before."""
        at = index(pages)
        before: Int64s = self._slots[at].astype(np.int64)
        if slots.size and int(np.maximum.reduce(slots)) > _NARROW_MAX and self._slots.itemsize == 4:
            self._widen()
        around = self._around(at)
        self.mappings -= int(np.count_nonzero(self._breaks(around)))
        self._slots[at] = slots
        self.mappings += int(np.count_nonzero(self._breaks(around)))
        more = int(np.count_nonzero(slots)) - int(np.count_nonzero(before))
        if isinstance(at, slice) and at.start >> _BLOCK_SHIFT == (at.stop - 1) >> _BLOCK_SHIFT:
            self._in_block[at.start >> _BLOCK_SHIFT] += more
        else:
            change = (slots != PRIVATE).view(np.int8) - (before != PRIVATE).view(np.int8)
            np.add.at(self._in_block, pages >> _BLOCK_SHIFT, change)
        self.shared += more
        return before

    def breaks(self, pages: Int64s) -> npt.NDArray[np.bool_]:
        """Return whether a mapping ends with each page; none is the arena's last."""
        return self._breaks(index(pages))

    def _breaks(self, at: Int64s | slice) -> npt.NDArray[np.bool_]:
        if isinstance(at, slice):
            slots = self._slots[at.start : at.stop + 1].astype(np.int64)
            here, following = slots[:-1], slots[1:]
        else:
            here, following = self.slots(at), self.slots(at + 1)
        ends: npt.NDArray[np.bool_] = following != here + (here != PRIVATE)
        return ends

    def _around(self, at: Int64s | slice) -> Int64s | slice:
        """The pages, and those before them, with which mappings may end."""
        if isinstance(at, slice):
            return slice(max(at.start - 1, 0), min(at.stop, self.pages - 1))
        around = np.unique(np.concatenate((at - 1, at)))
        return around[(around >= 0) & (around < self.pages - 1)]

    def mapped(self, first: int = 0, count: int | None = None) -> Int64s:
        """Return the pages of a range (all, if none is given) that map a slot, ascending."""
        end = self.pages if count is None else first + count
        blocks = np.flatnonzero(self._in_block[first >> _BLOCK_SHIFT : -(-end // _BLOCK_PAGES)])
        parts = []
        for block in (blocks + (first >> _BLOCK_SHIFT)).tolist():
            low = max(first, block << _BLOCK_SHIFT)
            high = min(end, (block + 1) << _BLOCK_SHIFT)
            parts.append(np.flatnonzero(self._slots[low:high]) + low)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def mapped_slots(self) -> npt.NDArray[np.unsignedinteger]:
        """Return the slots that pages map, in the pages' order."""
        return self._slots[self.mapped()]

    def _widen(self) -> None:
        narrow = self._slots
        pages = self.mapped()
        self._slots = _reserve(self.pages, np.dtype(np.uint64))
        self._slots[pages] = narrow[pages]


def _reserve(pages: int, dtype: np.dtype[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, pages * dtype.itemsize, flags=flags)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no address space for the books of {pages} pages") from error
    return np.frombuffer(memory, dtype)
