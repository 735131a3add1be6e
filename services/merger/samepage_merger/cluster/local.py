"""Finds pages on this host: in the store by digest, then among the arenas by fingerprint.

What an arena has may be something else by the time that it is read, so its bytes are used, or sent
to another host, only when they have the digest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.digests import Fingerprints, are_zero, equal
from samepage_merger.cluster.keys import keys_of
from samepage_merger.cluster.locator import Locator, Places
from samepage_merger.cluster.promoting import STEP_PAGES, Promoter
from samepage_merger.domains import Domain
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Indices, Int64s, unique_inverse
from samepage_merger.store import StoreFullError

_NO_NUMBERS: Indices = np.empty(0, np.intp)


class Local:
    """Everything that this host has."""

    def __init__(self, locator: Locator, promoter: Promoter) -> None:
        self._locator = locator
        self._promoter = promoter

    async def pages(
        self, domain: Domain, digests: Digests, fingerprints: Fingerprints
    ) -> tuple[Mask, bytes]:
        """Return which pages are here, and their bytes, in order.

        What comes from a slot was found by its digest's key alone: the receiver checks it.

        Args:
            fingerprints: as many as digests, or none: then only the store is looked at.
        """
        slots = domain.catalog.look_up(digests)
        found = slots != PRIVATE
        missing = np.flatnonzero(~found & ~are_zero(digests))
        if not (missing.size and len(fingerprints)):
            return found, domain.store.read_all(slots[found])
        pages = np.empty((len(digests), PAGE_SIZE), np.uint8)
        stored = np.frombuffer(domain.store.read_all(slots[found]), np.uint8)
        pages[found] = stored.reshape(-1, PAGE_SIZE)
        places = await self._locator.locate(domain, fingerprints[missing])
        for place in places:
            numbers = missing[place.numbers]
            for low in range(0, numbers.size, STEP_PAGES):
                part = slice(low, low + STEP_PAGES)
                good, data = await self._copies(place, part, digests[numbers[part]])
                pages[numbers[part][good]] = data[good]
                found[numbers[part][good]] = True
        return found, pages[found].tobytes()

    @asynccontextmanager
    async def slots(
        self, domain: Domain, digests: Digests, fingerprints: Fingerprints
    ) -> AsyncIterator[Int64s]:
        """Give a slot for each digest, PRIVATE where there is none; their bytes were checked.

        A page that is only in an arena is given a slot, which the arena maps from then on. The
        slots are not freed for as long as the block runs. Of digests of zeros none is given.

        Args:
            fingerprints: as many as digests, or none: then only the store is looked at.
        """
        async with AsyncExitStack() as stack:
            slots = await stack.enter_async_context(domain.catalog.found(digests))
            missing = np.flatnonzero((slots == PRIVATE) & ~are_zero(digests))
            if missing.size and len(fingerprints):
                for place in await self._locator.locate(domain, fingerprints[missing]):
                    numbers = missing[place.numbers]
                    for low in range(0, numbers.size, STEP_PAGES):
                        part = slice(low, low + STEP_PAGES)
                        mine = numbers[part]
                        made = self._promoted(place, part, digests[mine])
                        slots[mine] = await stack.enter_async_context(made)
            yield slots

    async def _copies(
        self, place: Places, part: slice, digests: Digests
    ) -> tuple[Mask, np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
        """Return which places hold pages with these digests, and what they hold."""
        arena, domain = place.arena, place.arena.domain
        pages = place.pages[part]
        slots = arena.map.slots(pages)
        data = np.zeros((pages.size, PAGE_SIZE), np.uint8)
        shared = slots != PRIVATE
        stored = domain.store.read_all(slots[shared])
        data[shared] = np.frombuffer(stored, np.uint8).reshape(-1, PAGE_SIZE)
        private, at = unique_inverse(pages[~shared])
        if private.size:
            read = await self._promoter.read(arena, private)
            data[~shared] = np.frombuffer(read.data, np.uint8).reshape(-1, PAGE_SIZE)[at]
        good = equal(await domain.digester.pages_apart(data.tobytes()), digests)
        known = good & shared & domain.books.table.contains(slots)
        domain.catalog.add(keys_of(digests[known]), slots[known])
        return good, data

    @asynccontextmanager
    async def _promoted(
        self, place: Places, part: slice, digests: Digests
    ) -> AsyncIterator[Int64s]:
        """Give the slot of each place that has its digest and maps a slot, then if not now."""
        arena, domain = place.arena, place.arena.domain
        pages = place.pages[part]
        private = pages[arena.map.slots(pages) == PRIVATE]
        private, first = np.unique(private, return_index=True)
        wanted = digests[arena.map.slots(pages) == PRIVATE][first]
        async with AsyncExitStack() as stack:
            if private.size:
                try:
                    made = self._promoter.promoted(arena, private, wanted)
                    await stack.enter_async_context(made)
                except StoreFullError:
                    pass
            slots = arena.map.slots(pages)
            hold = domain.books.hold(slots)
            try:
                mapped = slots != PRIVATE
                good = mapped.copy()
                good[mapped] = await domain.catalog.verify(digests[mapped], slots[mapped])
                domain.catalog.add(keys_of(digests[good]), slots[good])
                yield np.where(good, slots, PRIVATE)
            finally:
                domain.free(domain.books.release(hold))


def deposit(domain: Domain, digests: Digests, data: Bytes) -> tuple[Int64s, int]:
    """Put pages, whose digests were checked, into fresh slots; return these, and their hold.

    The caller releases the hold when pages map them: `domain.free(domain.books.release(hold))`.

    Raises:
        StoreFullError: the store has no room.
    """
    slots = domain.store.reserve(len(digests)) + np.arange(len(digests))
    hold = domain.books.add(slots)
    try:
        domain.store.write(int(slots[0]), data)
    except StoreFullError:
        domain.free(domain.books.release(hold))
        raise
    domain.catalog.add_fresh(keys_of(digests), slots)
    return slots, hold
