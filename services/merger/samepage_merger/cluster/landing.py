"""Puts the pages of another host's arena where they belong: maps what is here, fetches the rest.

Theory. Pages come in any number at a time. Either they are away already, so that whoever touches
one waits, or they are absent in an arena that nobody knows. They are cut into chunks, a few of
which are under way at once, so that one is fetched while another is looked up and a third is
mapped. For each chunk
1. what this host's store has is found by digest, and mapped: no byte is moved, and each is read
   once, to check the digest;
2. what other arenas of this host have is given slots, and mapped too;
3. the rest is fetched, each digest once, into slots that follow each other in the order of the
   pages, so that what lies side by side becomes one mapping;
4. what could not be mapped (no mapping left) is filled.
A digest that another chunk is fetching just now is waited for, and then found in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from samepage.daemon import wire
from samepage.daemon.failpoints import failpoint
from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.digests import Fingerprints, in_thread
from samepage_merger.cluster.fetch import Missing, Take
from samepage_merger.cluster.keys import Keys, are_among, are_distinct, keys_of
from samepage_merger.domains import Domain, RefusedError
from samepage_merger.headroom import Headroom
from samepage_merger.mappings import MappingBudget
from samepage_merger.orders import GONE, Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Indices, Int64s, join
from samepage_merger.store import Store, StoreFullError

CHUNK_PAGES = 8192
_CHUNKS_AT_ONCE = 3
_FETCH_PAGES = CHUNK_PAGES
_FILL_PAGES = wire.READ_PAGES_MAX

Landed = Callable[[], Coroutine[object, object, None]]


async def _nobody() -> None:
    pass


class Local(Protocol):
    """What this host has (local.py)."""

    def slots(
        self, domain: Domain, digests: Digests, fingerprints: Fingerprints
    ) -> AbstractAsyncContextManager[Int64s]:
        """Give a slot for each digest, PRIVATE where there is none; their bytes were checked, and
        they stay for as long as the block runs."""


class Fetcher(Protocol):
    """What other hosts have (fetch.py)."""

    async def fetch(
        self,
        domain: Domain,
        digests: Digests,
        fingerprints: Fingerprints,
        hints: Sequence[str],
        take: Take,
    ) -> Missing:
        """Fetch pages, `hints` being hosts that should have them; each goes to `take` once, as it
        comes, with the digest that it should have."""


@dataclass(frozen=True)
class Tools:
    """What the work is done with."""

    orders: Orders
    headroom: Headroom
    mappings: MappingBudget
    local: Local
    fetcher: Fetcher


@dataclass(frozen=True)
class Chunk:
    """Pages (ascending) that are wanted, by what they hold."""

    pages: Int64s
    digests: Digests
    fingerprints: Fingerprints

    def __getitem__(self, rows: Indices | Mask | slice) -> Chunk:
        return Chunk(self.pages[rows], self.digests[rows], self.fingerprints[rows])


class Landing:
    """Fills one arena.

    Args:
        holder: the host that surely has all of it.

    Attributes:
        fresh: nobody knows the arena yet, and its pages are absent. Else they are away by the time
            that they are taken.
        mapped, fetched: pages that were here already, and that came.
    """

    def __init__(self, tools: Tools, arena: Arena, holder: str, *, fresh: bool = False) -> None:
        self.mapped = 0
        self.fetched = 0
        self._orders = tools.orders
        self._headroom = tools.headroom
        self._mappings = tools.mappings
        self._local = tools.local
        self._fetcher = tools.fetcher
        self._arena = arena
        self._holder = holder
        self.fresh = fresh
        self._places = asyncio.Semaphore(_CHUNKS_AT_ONCE)
        self._flying: dict[asyncio.Task[None], Keys] = {}
        self._failed: BaseException | None = None

    async def take(self, chunk: Chunk, landed: Landed = _nobody) -> None:
        """Land pages; returns when there is room for more.

        Args:
            landed: called when they have landed, or never will; one that is told takes CHUNK_PAGES
                at most.

        Raises:
            RefusedError: those before could not be landed, or there is no memory for these.
        """
        for low in range(0, max(1, chunk.pages.size), CHUNK_PAGES):
            await self._places.acquire()
            self._check()
            part = chunk[low : low + CHUNK_PAGES]
            task = asyncio.ensure_future(
                self._land_and_tell(part, list(self._flying.items()), landed)
            )
            self._flying[task] = np.sort(keys_of(part.digests))
            task.add_done_callback(self._landed)

    async def finish(self) -> None:
        """Wait until all that was taken in has landed.

        Raises:
            RefusedError: it could not be.
        """
        while self._flying:
            await asyncio.wait(list(self._flying))
        self._check()

    async def stop(self) -> None:
        """End what is under way."""
        for task in list(self._flying):
            task.cancel()
        while self._flying:
            await asyncio.wait(list(self._flying))

    def _landed(self, task: asyncio.Task[None]) -> None:
        del self._flying[task]
        self._places.release()
        error = None if task.cancelled() else task.exception()
        self._failed = self._failed or error

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    async def _land_and_tell(
        self, chunk: Chunk, before: list[tuple[asyncio.Task[None], Keys]], landed: Landed
    ) -> None:
        try:
            await self._land(chunk, before)
        except Exception:
            # Nobody wants these any more; whoever waits with more learns why from the next `take`.
            with contextlib.suppress(RefusedError):
                await landed()
            raise
        await landed()

    async def _land(self, chunk: Chunk, before: list[tuple[asyncio.Task[None], Keys]]) -> None:
        chunk = await self._map_local(chunk)
        wait = np.zeros(chunk.pages.size, np.bool_)
        awaited = []
        for task, keys in before:
            same = are_among(keys_of(chunk.digests), keys)
            if same.any():
                awaited.append(task)
                wait |= same
        await self._fetch_all(chunk[~wait])
        if awaited:
            await asyncio.wait(awaited)
            await self._fetch_all(await self._map_local(chunk[wait]))

    async def map_slots(self, pages: Int64s, slots: Int64s) -> None:
        """Let pages map slots that this host has, and that are held.

        Raises:
            RefusedError: there is no memory for it, or the agent does not do it.
        """
        if not pages.size:
            return
        granted = self._headroom.take(pages.size)
        try:
            if granted < pages.size:
                raise RefusedError(errno.ENOMEM, _NO_HEADROOM)
            await self._map(pages, slots)
        finally:
            self._headroom.give_back(granted)
        self.mapped += pages.size
        failpoint("clone.mapped")

    async def _map_local(self, chunk: Chunk) -> Chunk:
        """Map what this host has; return the rest."""
        domain = self._arena.domain
        async with self._local.slots(domain, chunk.digests, chunk.fingerprints) as slots:
            here = slots != PRIVATE
            if not here.any():
                return chunk
            await self.map_slots(chunk.pages[here], slots[here])
        return chunk[~here]

    async def _fetch_all(self, chunk: Chunk) -> None:
        """Fetch pages, each digest once, and map them."""
        while chunk.pages.size:
            first, of_page = distinct(chunk.digests)
            some = of_page < _FETCH_PAGES
            await self._fetch(chunk[some], chunk[first[:_FETCH_PAGES]], of_page[some])
            chunk = chunk[~some]

    async def _fetch(self, chunk: Chunk, wanted: Chunk, of_page: Indices) -> None:
        """Fetch the pages that are wanted, and map each of the chunk's to its own."""
        domain = self._arena.domain
        store = domain.store
        count = wanted.pages.size
        if self._headroom.available_bytes() < count * wire.PAGE_SIZE:
            raise RefusedError(errno.ENOMEM, _NO_MEMORY)
        slots = store.reserve(count) + np.arange(count)
        hold = domain.books.add(slots)

        async def take(numbers: Indices, data: Bytes) -> None:
            await in_thread(
                lambda: write_slots(store, slots[numbers], memoryview(data)), numbers.size
            )

        try:
            missing = await self._fetcher.fetch(
                domain, wanted.digests, wanted.fingerprints, [self._holder], take
            )
            if missing.numbers.size:
                raise _not_sent(self._holder, missing)
            domain.catalog.add_fresh(keys_of(wanted.digests), slots)
            domain.catalog.groups.add(wanted.pages, wanted.digests, int(slots[0]))
            failpoint("clone.fetched")
            await self._map(chunk.pages, slots[of_page])
        except StoreFullError:
            raise RefusedError(errno.ENOSPC, _NO_ROOM) from None
        finally:
            domain.free(domain.books.release(hold))
        self.fetched += chunk.pages.size

    async def _map(self, pages: Int64s, slots: Int64s) -> None:
        """Let pages map slots, which are held; those for which there is no mapping get bytes of
        their own."""
        chosen = self._mappings.longest(self._arena, pages, slots)
        flags = wire.REPLACE_ABSENT if self.fresh else 0
        outcomes = np.full(pages.size, Outcome.NO_MAPPING, np.uint8)
        outcomes[chosen] = await self._orders.replace(
            self._arena, pages[chosen], slots[chosen], flags
        )
        left = np.flatnonzero(outcomes != Outcome.MERGED)
        if self.fresh and left.size:
            left = await self._map_away(pages, slots, outcomes, left)
        store = self._arena.domain.store
        for low in range(0, left.size, _FILL_PAGES):
            rows = left[low : low + _FILL_PAGES]
            rows = rows[self._arena.away.contains(pages[rows])]
            data = store.read_all(slots[rows])
            check(await self._orders.fill(self._arena, pages[rows], data))

    async def _map_away(
        self, pages: Int64s, slots: Int64s, outcomes: Outcomes, left: Indices
    ) -> Indices:
        """Make away what could not be mapped while it was absent, and map what there are mappings
        for; return what is left. (An older agent maps only what is away, and so does this one what
        mlockall() has filled.)"""
        domain = self._arena.domain
        for low in range(0, left.size, _FILL_PAGES):
            rows = left[low : low + _FILL_PAGES]
            digests = await domain.digester.pages_apart(domain.store.read_all(slots[rows]))
            check(await self._orders.away(self._arena, pages[rows], digests))
        again = left[outcomes[left] != Outcome.NO_MAPPING]
        outcomes[again] = await self._orders.replace(self._arena, pages[again], slots[again])
        still: Indices = left[outcomes[left] != Outcome.MERGED]
        return still


def _not_sent(holder: str, missing: Missing) -> RefusedError:
    if missing.gone.all():
        return RefusedError(errno.ENOENT, f"{holder!r} does not hold the arena's pages any more")
    text = f"{missing.numbers.size} pages did not come from {holder!r} or another host: try again"
    return RefusedError(errno.EAGAIN, text)


def check(outcomes: Outcomes) -> None:
    """See that an agent has done what it was told to an arena that nobody else knows yet.

    Raises:
        RefusedError: it has not.
    """
    if (outcomes == GONE).any():
        raise RefusedError(errno.ECONNRESET, "the process that the arena is for is gone")
    if (outcomes == Outcome.UNSUPPORTED).any():
        raise RefusedError(errno.EOPNOTSUPP, _UNSUPPORTED)
    if outcomes.any():
        raise RefusedError(errno.EAGAIN, "the process that the arena is for was too busy")


def distinct(digests: Digests) -> tuple[Indices, Indices]:
    """Return where each digest is found first, ascending, and which of these each digest is."""
    if are_distinct(keys_of(digests)):
        every = np.arange(len(digests))
        return every, every
    whole = np.ascontiguousarray(digests).view("V32").reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return first[order], rank[inverse.reshape(-1)]


def write_slots(store: Store, slots: Int64s, data: memoryview) -> None:
    """Fill slots (ascending) with pages, one after the other in `data`.

    Raises:
        StoreFullError: there is no room.
    """
    for slot, count in zip(*(column.tolist() for column in join(slots)), strict=True):
        store.write(slot, data[: count * wire.PAGE_SIZE])
        data = data[count * wire.PAGE_SIZE :]


_NO_HEADROOM = (
    "sharing what this host has already might not be undone within its memory: free some, or change"
    " headroom_percent of its merger"
)
_NO_MEMORY = "this host has not enough memory left for the arena: free some"
_NO_ROOM = "the store of this host has no room for the arena: free some memory, or raise the limit"
_UNSUPPORTED = "the kernel lacks what it takes for pages to be away: see `samepage doctor`"
