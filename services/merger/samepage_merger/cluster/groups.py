"""Groups of pages that are known by one digest: what is equal is told of in 32 bytes, not in 4096.

Theory. The digests of 128 pages are as long as a page, and their digest names the group. Of a group
whose pages lie in slots that follow each other the first slot is noted, under the first bytes of
its digest: 16 bytes for 128 pages. That proves nothing, as in the catalog: whoever finds a group
reads its slots, and what comes out is the digests of all its pages, checked.

Slots are never written twice, nor their numbers used again, so which digest a slot has can be
remembered for ever; the few that were seen last are, since they are about to be asked for again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from samepage.daemon.wire import DIGEST_BYTES, PAGE_SIZE
from samepage_merger.books import Books
from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import Digester, are_zero, equal, in_thread
from samepage_merger.cluster.keys import KeyTable, keys_of
from samepage_merger.runs import Int64s
from samepage_merger.store import Store

GROUP_PAGES = PAGE_SIZE // DIGEST_BYTES
_REMEMBERED = 4


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

    def __init__(
        self, books: Books, store: Store, digester: Digester, free: Callable[[Int64s], None]
    ) -> None:
        self._books = books
        self._store = store
        self._digester = digester
        self._free = free
        self._table = KeyTable(books.table.contains)
        self._seen: deque[tuple[Int64s, Digests]] = deque(maxlen=_REMEMBERED)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the table takes."""
        return self._table.nbytes

    def add(self, pages: Int64s, digests: Digests, first_slot: int) -> None:
        """Note the whole groups among pages (ascending) that are in fresh slots, one by one."""
        rows = np.flatnonzero(pages[: max(0, pages.size - GROUP_PAGES + 1)] % GROUP_PAGES == 0)
        rows = rows[pages[rows + GROUP_PAGES - 1] - pages[rows] == GROUP_PAGES - 1]
        if rows.size:
            of_groups = digests[(rows[:, None] + np.arange(GROUP_PAGES)).reshape(-1)]
            self._table.add(keys_of(group_digests(self._digester, of_groups)), first_slot + rows)

    async def find(self, told: Digests) -> tuple[Mask, Digests]:
        """Return which groups are known, and the digests of their pages; zeros where not."""
        known = are_zero(told)
        digests = np.zeros((len(told), GROUP_PAGES, DIGEST_BYTES), np.uint8)
        number, first = self._table.find(keys_of(told))
        slots = first[:, None] + np.arange(GROUP_PAGES)
        live = self._books.table.contains(slots.reshape(-1)).reshape(slots.shape).all(axis=1)
        number, at = np.unique(number[live], return_index=True)
        slots = slots[live][at]
        if not number.size:
            return known, digests.reshape(-1, DIGEST_BYTES)
        hold = self._books.hold(slots.reshape(-1))
        try:
            found = await in_thread(lambda: self._hash(slots), slots.size)
        finally:
            self._free(self._books.release(hold))
        good = equal(group_digests(self._digester, found.reshape(-1, DIGEST_BYTES)), told[number])
        known[number[good]] = True
        digests[number[good]] = found[good]
        self._remember(slots[good].reshape(-1), found[good])
        return known, digests.reshape(-1, DIGEST_BYTES)

    def seen(self, slots: Int64s, digests: Digests) -> Mask:
        """Return which slots were seen to have their digest, not long ago."""
        good = np.zeros(slots.size, np.bool_)
        for seen, of_seen in self._seen:
            at = np.minimum(np.searchsorted(seen, slots), seen.size - 1)
            good |= (seen[at] == slots) & equal(of_seen[at], digests)
        return good

    def _hash(self, slots: Int64s) -> Digests:
        """Return the digests of slots, a row a group."""
        hashed = [self._digester.pages(self._store.read_all(group)) for group in slots]
        return np.stack(hashed)

    def _remember(self, slots: Int64s, digests: Digests) -> None:
        if slots.size:
            order = np.argsort(slots, kind="stable")
            self._seen.append((slots[order], digests.reshape(-1, DIGEST_BYTES)[order]))
