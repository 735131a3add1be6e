"""Groups of pages that are known by one digest: what is equal is told of in 32 bytes, not in 4096.

Theory. The digests of 128 pages are as long as a page, and their digest names the group. Of a group
whose pages came here, and lie in slots that follow each other, that digest and the first slot are
noted: 48 bytes for 128 pages. The bytes had their digests when they were written, and slots are
never written twice, nor their numbers used again; so as long as its slots live, a known group is
mapped without a look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from samepage.daemon.wire import DIGEST_BYTES, PAGE_SIZE
from samepage_merger.books import Books
from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import Digester, are_zero, equal
from samepage_merger.cluster.keys import KeyTable, keys_of
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s

GROUP_PAGES = PAGE_SIZE // DIGEST_BYTES

_GROUP = np.dtype([("digest", np.uint8, (DIGEST_BYTES,)), ("slot", np.int64)])


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of groups.

    Attributes:
        mask: which of them are.
        slots: of their pages, 128 a group; PRIVATE for pages of zeros, and of unknown groups.
    """

    mask: Mask
    slots: Int64s


def group_digests(digester: Digester, digests: Digests) -> Digests:
    """Return the digests of the groups that pages make up; the last may be short."""
    groups = -(-len(digests) // GROUP_PAGES)
    padded = np.zeros((groups * GROUP_PAGES, DIGEST_BYTES), np.uint8)
    padded[: len(digests)] = digests
    return digester.pages(padded.reshape(-1).data)


class Groups:
    """The groups of one domain whose slots are known.

    Args:
        free: gives back slots that are in the books no more.
    """

    def __init__(self, books: Books, digester: Digester, free: Callable[[Int64s], None]) -> None:
        self._books = books
        self._digester = digester
        self._free = free
        self._table = KeyTable(lambda groups: self._live(groups["slot"]), _GROUP)

    def __len__(self) -> int:
        """Groups, those of freed slots too until they are dropped."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the table takes."""
        return self._table.nbytes

    def add(self, pages: Int64s, digests: Digests, first_slot: int) -> None:
        """Note the whole groups among pages (ascending) whose bytes, which had these digests, are
        in fresh slots, one by one."""
        rows = np.flatnonzero(pages[: max(0, pages.size - GROUP_PAGES + 1)] % GROUP_PAGES == 0)
        rows = rows[pages[rows + GROUP_PAGES - 1] - pages[rows] == GROUP_PAGES - 1]
        if rows.size:
            of_groups = digests[(rows[:, None] + np.arange(GROUP_PAGES)).reshape(-1)]
            groups = np.empty(rows.size, _GROUP)
            groups["digest"] = group_digests(self._digester, of_groups)
            groups["slot"] = first_slot + rows
            self._table.add(keys_of(groups["digest"]), groups)

    @contextmanager
    def found(self, told: Digests) -> Iterator[Known]:
        """Give what is known of groups; the slots are not freed for as long as the block runs."""
        mask = are_zero(told)
        number, groups = self._table.find(keys_of(told))
        good = equal(groups["digest"], told[number]) & self._live(groups["slot"])
        number, first = number[good], groups["slot"][good]
        mask[number] = True
        slots = np.full((len(told), GROUP_PAGES), PRIVATE, np.int64)
        slots[number] = _all_of(first)
        hold = self._books.hold(slots[number].reshape(-1))
        try:
            yield Known(mask, slots.reshape(-1))
        finally:
            self._free(self._books.release(hold))

    def _live(self, first: Int64s) -> Mask:
        """Return of which groups, by the first slot, every slot lives."""
        live = self._books.table.contains(_all_of(first).reshape(-1))
        every: Mask = np.logical_and.reduce(live.reshape(-1, GROUP_PAGES), axis=1)
        return every


def _all_of(first: Int64s) -> Int64s:
    """Return the slots of groups, a row a group."""
    return first[:, None] + np.arange(GROUP_PAGES)
