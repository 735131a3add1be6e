"""Which slot of a domain's store has which digest.

Theory. Of each digest the first 8 bytes are kept, with the slot: 16 bytes an entry. A key proves
nothing: a slot is used only when its bytes have the whole digest. Slots are never written twice and
their numbers never used again, so what was entered stays true as long as the slot lives; entries of
slots that were freed are passed over when they are found, and dropped in time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt

from samepage_merger.books import Books
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.digests import Digester, equal
from samepage_merger.cluster.groups import Groups
from samepage_merger.cluster.keys import Keys, KeyTable, keys_of
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s
from samepage_merger.store import Store

_VERIFY_PAGES = 512


class Catalog:
    """The slots of one domain whose digests are known.

    Args:
        free: gives back slots that are in the books no more.

    Attributes:
        groups: what is known of many pages by one digest.
    """

    def __init__(
        self, books: Books, store: Store, digester: Digester, free: Callable[[Int64s], None]
    ) -> None:
        self._books = books
        self._store = store
        self._digester = digester
        self._free = free
        self._table = KeyTable(books.table.contains)
        self.groups = Groups(books, digester, free)

    def __len__(self) -> int:
        """Entries, those of freed slots too until they are dropped."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the entries take."""
        return self._table.nbytes + self.groups.nbytes

    def add(self, keys: Keys, slots: Int64s) -> None:
        """Enter live slots, by the keys of their digests; those that are known are left out."""
        number, slot = self.candidates(keys)
        new = np.ones(keys.size, np.bool_)
        new[number[slots[number] == slot]] = False
        self.add_fresh(keys[new], slots[new])

    def add_fresh(self, keys: Keys, slots: Int64s) -> None:
        """Enter live slots that were never entered."""
        self._table.add(keys, slots)

    def candidates(self, keys: Keys) -> tuple[Int64s, Int64s]:
        """Return all live slots with these keys: which of the keys, ascending, and the slot."""
        number, slot = self._table.find(keys)
        alive = self._books.table.contains(slot)
        return number[alive], slot[alive]

    def keys(self, slots: Int64s) -> Keys:
        """Return the keys of entered slots (ascending); looks at every entry."""
        all_keys, all_slots = self._table.all()
        order = np.argsort(all_slots, kind="stable")
        keys: Keys = all_keys[order[np.searchsorted(all_slots, slots, sorter=order)]]
        return keys

    def look_up(self, digests: Digests) -> Int64s:
        """Return a live slot for each digest, PRIVATE where there is none, by its key alone.

        For one who passes the bytes on to somebody who checks them.
        """
        return self.look_up_keys(keys_of(digests))

    def look_up_keys(self, keys: Keys) -> Int64s:
        """Return a live slot for each key, PRIVATE where there is none."""
        number, slot = self.candidates(keys)
        slots = np.full(keys.size, PRIVATE, np.int64)
        slots[number] = slot
        return slots

    def page(self, digest: bytes) -> bytes | None:
        """Return the bytes of one page, by its key alone; the shortest way there is."""
        for slot in self._table.find_one(np.frombuffer(digest, np.uint64, 1)[0]):
            if self._books.table.contains(np.array([slot]))[0]:
                return self._store.read(slot, 1)
        return None

    @asynccontextmanager
    async def found(self, digests: Digests) -> AsyncIterator[Int64s]:
        """Give a slot for each digest, PRIVATE where there is none; their bytes were checked.

        The slots are not freed for as long as the block runs.
        """
        number, slot = self.candidates(keys_of(digests))
        hold = self._books.hold(slot)
        try:
            good = await self.verify(digests[number], slot)
            slots = np.full(len(digests), PRIVATE, np.int64)
            slots[number[good]] = slot[good]
            yield slots
        finally:
            self._free(self._books.release(hold))

    async def verify(self, digests: Digests, slots: Int64s) -> npt.NDArray[np.bool_]:
        """Return whether each slot's bytes have its digest. The slots must be held."""
        good = np.zeros(slots.size, np.bool_)
        for low in range(0, slots.size, _VERIFY_PAGES):
            part = slice(low, low + _VERIFY_PAGES)
            data = self._store.read_all(slots[part])
            good[part] = equal(await self._digester.pages_apart(data), digests[part])
        return good
