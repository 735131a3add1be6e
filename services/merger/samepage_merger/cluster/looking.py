"""What pages of an arena hold, for a snapshot of it: looked at to be held, or to be offered."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np

from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage_merger.arena import Arena, State
from samepage_merger.cluster.away import Bytes, Digests, Mask, no_digests
from samepage_merger.cluster.digests import (
    FINGERPRINT_BYTES,
    Fingerprints,
    are_zero,
    fingerprints,
    in_thread,
    parse_fingerprints,
)
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.local import Local, deposit
from samepage_merger.cluster.offers import Rows
from samepage_merger.cluster.promoting import Promoter
from samepage_merger.cluster.snapshot_errors import NoAnswerError, no_answer
from samepage_merger.domains import Domains
from samepage_merger.orders import Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Indices, Int64s, index

_NO_FINGERPRINTS = parse_fingerprints(b"")


@dataclass(frozen=True, slots=True)
class Step:
    """What some pages were found to hold.

    Attributes:
        slots: that have their bytes; PRIVATE for zeros.
        loose: of pages that can still be written unnoticed, why.
    """

    pages: Int64s
    digests: Digests
    fingerprints: Fingerprints
    slots: Int64s
    mapped: Mask
    loose: Outcomes


class Looker:
    """Looks at pages.

    Args:
        local, fetcher: bring back pages that are away.
    """

    def __init__(
        self, domains: Domains, orders: Orders, promoter: Promoter, local: Local, fetcher: Fetcher
    ) -> None:
        self._domains = domains
        self._orders = orders
        self._promoter = promoter
        self._local = local
        self._fetcher = fetcher

    async def look(self, stack: AsyncExitStack, arena: Arena, pages: Int64s) -> Step:
        """Return what pages hold; its slots are not freed before the stack is unwound."""
        if arena.state is not State.OPEN:
            raise no_answer(arena)
        domain = arena.domain
        digests = no_digests(pages.size)
        prints = np.zeros((pages.size, FINGERPRINT_BYTES), np.uint8)
        slots = arena.map.slots(pages)
        mapped = slots != PRIVATE
        seed = self._domains.seed(domain)
        hold = domain.books.hold(slots[mapped])
        stack.callback(lambda: domain.free(domain.books.release(hold)))
        away = ~mapped & arena.away.contains(pages)
        if away.any():
            slots[away] = await self.bring_back(stack, arena, arena.away.digests(pages[away]))
        stored = slots != PRIVATE
        data = domain.store.read_all(slots[stored])

        def hash_all() -> tuple[Digests, Fingerprints]:
            return domain.digester.pages(data), fingerprints(seed, data)

        digests[stored], prints[stored] = await in_thread(hash_all, slots.size)
        private = np.flatnonzero(~stored & ~away)
        loose = np.empty(0, np.uint8)
        if private.size:
            made = self._promoter.promoted(arena, pages[private], seed=seed)
            promoted = await stack.enter_async_context(made)
            check_read(arena, promoted.read.outcomes)
            digests[private] = promoted.read.digests
            prints[private] = promoted.read.fingerprints
            slots[private] = promoted.slots
            mapped[private] = promoted.outcomes == Outcome.MERGED
            settled = mapped[private] | (promoted.outcomes == Outcome.ABSENT)
            loose = promoted.outcomes[~settled]
        prints[are_zero(digests)] = 0
        return Step(pages, digests, prints, slots, mapped, loose)

    async def read(self, arena: Arena, pages: Int64s, data: Rows) -> tuple[Digests, Fingerprints]:
        """Read pages as they are now, into rows of their own, and leave the arena alone.

        Rows of pages that hold only zeros are left as they are.

        Raises:
            NoAnswerError: of the arena's process, or of hosts that have pages of it.
            StoreFullError: the store has no room for pages that are away.
        """
        if arena.state is not State.OPEN:
            raise no_answer(arena)
        digests = no_digests(pages.size)
        prints = np.zeros((pages.size, FINGERPRINT_BYTES), np.uint8)
        seed = self._domains.seed(arena.domain)
        away = arena.away.contains(pages)
        async with AsyncExitStack() as stack:
            if away.any():
                digests[away] = arena.away.digests(pages[away])
                slots = await self.bring_back(stack, arena, digests[away])
                stored = arena.domain.store.read_all(slots)
                rows = np.flatnonzero(away)[slots != PRIVATE]
                data[rows] = np.frombuffer(stored, np.uint8).reshape(-1, PAGE_SIZE)
                prints[rows] = fingerprints(seed, stored)

        def hash_rows(rows: Indices) -> None:
            at = index(rows)
            found = data[at].reshape(-1).data
            digests[at] = arena.domain.digester.pages(found)
            prints[at] = fingerprints(seed, found)

        await self._read_here(arena, pages, np.flatnonzero(~away), data, hash_rows)
        prints[are_zero(digests)] = 0
        return digests, prints

    async def _read_here(
        self,
        arena: Arena,
        pages: Int64s,
        rows: Indices,
        data: Rows,
        hash_rows: Callable[[Indices], None],
    ) -> None:
        """Read those rows' pages from the arena; each part is hashed while the next is read."""
        hashing: list[asyncio.Future[None]] = []

        def keep(low: int, outcomes: Outcomes, window: memoryview) -> None:
            check_read(arena, outcomes)
            read = np.flatnonzero(outcomes == Outcome.MERGED)
            if read.size:
                part = rows[low : low + outcomes.size][read]
                pages_read = np.frombuffer(window, np.uint8).reshape(-1, PAGE_SIZE)
                data[index(part)] = pages_read[index(read)]
                hashed = in_thread(functools.partial(hash_rows, part), part.size)
                hashing.append(asyncio.ensure_future(hashed))

        try:
            outcomes = await self._orders.read(arena, pages[rows], keep)
        finally:
            await asyncio.gather(*hashing)
        check_read(arena, outcomes)

    async def bring_back(self, stack: AsyncExitStack, arena: Arena, digests: Digests) -> Int64s:
        """Return slots with the bytes of pages that are away; they stay away for the arena."""
        domain = arena.domain
        found = self._local.slots(domain, digests, _NO_FINGERPRINTS)
        slots = await stack.enter_async_context(found)
        missing = np.flatnonzero((slots == PRIVATE) & ~are_zero(digests))
        if not missing.size:
            return slots

        async def take(numbers: Indices, data: Bytes) -> None:
            made, hold = deposit(domain, digests[missing[numbers]], data)
            stack.callback(lambda: domain.free(domain.books.release(hold)))
            slots[missing[numbers]] = made

        left = await self._fetcher.fetch(domain, digests[missing], _NO_FINGERPRINTS, (), take)
        if left.numbers.size:
            raise NoAnswerError(
                f"{left.numbers.size} pages of arena {arena.name!r} are on other hosts, which do"
                " not send them now: see whether these hosts are up, and try again"
            )
        return slots


def check_read(arena: Arena, read: Outcomes) -> None:
    """Raise unless every page was read, or holds nothing.

    Raises:
        NoAnswerError: one was not.
    """
    if not bool(((read == Outcome.MERGED) | (read == Outcome.ABSENT)).all()):
        raise no_answer(arena)
