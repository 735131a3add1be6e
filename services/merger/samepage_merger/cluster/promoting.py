"""Gives private pages slots, and has their arena map them, so that memory does not grow.

The same as the first half of a merge (pairs.py), but with the pages' digests: somebody else asked
for these bytes by them, or will.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from samepage.daemon import wire
from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage_merger.arena import Arena
from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import (
    ZERO_PAGE,
    Fingerprints,
    are_zero,
    equal,
    fingerprints,
    in_thread,
)
from samepage_merger.cluster.keys import keys_of
from samepage_merger.orders import Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, join
from samepage_merger.store import StoreFullError

STEP_PAGES = wire.READ_PAGES_MAX


@dataclass(frozen=True, slots=True)
class PageBytes:
    """What was read of some pages of an arena.

    Attributes:
        outcomes: MERGED where a page was read, ABSENT where it holds nothing.
        data: bytes of each; of those not read they are zeros.
        digests: of `data`.
        fingerprints: of `data`; empty when they were not asked for.
    """

    outcomes: Outcomes
    data: memoryview
    digests: Digests
    fingerprints: Fingerprints


@dataclass(frozen=True, slots=True)
class Promoted:
    """What became of some pages of an arena.

    Attributes:
        read: what they held.
        slots: that have the bytes that were read; PRIVATE where there are none but zeros.
        outcomes: of replacing the page by its slot; else why there was nothing to replace.
    """

    read: PageBytes
    slots: Int64s
    outcomes: Outcomes


class Promoter:
    """Reads pages, and promotes them."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    async def read(self, arena: Arena, pages: Int64s, seed: int | None = None) -> PageBytes:
        """Read pages (ascending, each once); `seed` asks for fingerprints."""
        data = np.empty(pages.size * PAGE_SIZE, np.uint8).data

        def keep(low: int, outcomes: Outcomes, window: memoryview) -> None:
            data[low * PAGE_SIZE : low * PAGE_SIZE + len(window)] = window

        outcomes = await self._orders.read(arena, pages, keep)
        for at in np.flatnonzero(outcomes != Outcome.MERGED).tolist():
            data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] = ZERO_PAGE
        digester = arena.domain.digester

        def hash_all() -> tuple[Digests, Fingerprints]:
            return digester.pages(data), fingerprints(seed or 0, data if seed is not None else b"")

        return PageBytes(outcomes, data, *await in_thread(hash_all, pages.size))

    @asynccontextmanager
    async def promoted(
        self,
        arena: Arena,
        pages: Int64s,
        wanted: Digests | None = None,
        seed: int | None = None,
    ) -> AsyncIterator[Promoted]:
        """Give private pages (ascending, each once) slots and have them mapped.

        What cannot be mapped is in its slot all the same. The slots are not freed for as long as
        the block runs; then those go that nothing maps and nobody keeps.

        Args:
            wanted: only pages that have these digests.
            seed: asks for fingerprints.

        Raises:
            StoreFullError: the store has no room.
        """
        domain = arena.domain
        slots = domain.store.reserve(pages.size) + np.arange(pages.size)
        hold = domain.books.add(slots)
        try:
            async with arena.promoting:
                read = await self.read(arena, pages, seed)
                good = (read.outcomes == Outcome.MERGED) & (arena.map.slots(pages) == PRIVATE)
                if wanted is not None:
                    good &= equal(read.digests, wanted)
                stored = good & ~are_zero(read.digests)
                _write(arena, slots[stored], stored, read.data)
                slots = np.where(stored, slots, PRIVATE)
                outcomes = read.outcomes.copy()
                outcomes[good] = await self._orders.replace(arena, pages[good], slots[good])
            domain.catalog.add_fresh(keys_of(read.digests[stored]), slots[stored])
            yield Promoted(read, slots, outcomes)
        finally:
            domain.free(domain.books.release(hold))


def _write(arena: Arena, slots: Int64s, chosen: Mask, data: memoryview) -> None:
    """Fill slots with those pages of `data` that were chosen, run by run."""
    store = arena.domain.store
    if store.room(slots.size) < slots.size:
        raise StoreFullError
    first, count = join(slots)
    at = np.flatnonzero(chosen)
    starts = at[np.cumsum(count) - count]
    for slot, start, pages in zip(first.tolist(), starts.tolist(), count.tolist(), strict=True):
        store.write(slot, data[start * PAGE_SIZE : (start + pages) * PAGE_SIZE])
