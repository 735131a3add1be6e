"""Lets pages leave the host, in batches: read, made safe elsewhere, given up.

Theory. A batch of pages is read from its arena, its digests and fingerprints are made, and other
hosts or the spill files take what there is (securing.py). Then the agent is told to let go of those
pages that are safe, and of nothing else: it takes each page, compares it with the bytes that were
read, and only what is equal goes away. So a page that is written meanwhile stays, and whatever ends
this merger in between leaves a page either here, or away with its bytes elsewhere. The digests of a
batch are pinned from before anything is done with them until the agent's answer is in the books.

A few batches are under way at once, so that one is hashed while another is on its way to a host.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samepage.daemon import secrets, wire
from samepage.daemon.failpoints import failpoint
from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage.errors import InvalidArgumentError, NotFoundError
from samepage_merger.agents import ARENA_PAGES_MAX, Evicted
from samepage_merger.arena import Arena, State
from samepage_merger.cluster.away import Bytes, Digests
from samepage_merger.cluster.digests import Fingerprints, are_zero
from samepage_merger.cluster.keys import keys_of
from samepage_merger.cluster.promoting import Promoter
from samepage_merger.cluster.securing import Pages, Securer
from samepage_merger.domains import Domains, RefusedError
from samepage_merger.merging import FindArena
from samepage_merger.orders import Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, batches, expand, within

RUN = np.dtype([("arena", "<u4"), ("page", "<u8"), ("count", "<u8")])
OUTCOME_NAMES = ("held_elsewhere", "spilled", "kept", "no_room")

_BATCH_PAGES = wire.EVICT_PAGES_MAX
_BATCHES_AT_ONCE = 3
_PROGRESS_SECONDS = 0.1
_SWITCHED_OFF = (
    "nothing can be evicted: set spill_dir of this host's merger, or index, so that there is"
    " somewhere for pages to be"
)

_WIDE = np.dtype([("arena", "<i8"), ("page", "<i8"), ("count", "<i8")])

Counts = npt.NDArray[np.int64]
#: An arena, and first and count of runs of its pages.
_Work = tuple[Arena, Int64s, Int64s]

_HELD, _SPILLED, _KEPT, _NO_ROOM = range(len(OUTCOME_NAMES))


class NowhereError(RefusedError):
    """Eviction is switched off here."""


class Evictor:
    """Evicts pages.

    Args:
        secret: the cluster's, from which the seeds of fingerprints are derived.

    Attributes:
        outcomes: pages since start, by OUTCOME_NAMES.
    """

    def __init__(
        self, domains: Domains, find: FindArena, orders: Orders, securer: Securer, secret: bytes
    ) -> None:
        self._domains = domains
        self._find = find
        self._orders = orders
        self._promoter = Promoter(orders)
        self._securer = securer
        self._secret = secret
        self._at_once = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self.outcomes = np.zeros(len(OUTCOME_NAMES), np.int64)

    async def evict(
        self, domain: str, keys: Sequence[tuple[bytes, int]], runs: bytes
    ) -> AsyncGenerator[Counts, None]:
        """Evict runs of pages; yields what became of them now and then, and at the end.

        Args:
            domain: of all the arenas; those that are gone, or of another, are passed over.
            keys: agent number and arena number of each.
            runs: records of RUN.

        Raises:
            InvalidArgumentError: a run is malformed, or outside its arena.
            RefusedError: there is nowhere for pages to be.
        """
        arenas = [self._find(*key) for key in keys]
        arenas = [a if a is not None and a.domain.name == domain else None for a in arenas]
        records = _checked(runs, arenas)
        works = []
        for number, arena in enumerate(arenas):
            if arena is not None:
                mine = records[records["arena"] == number].astype(_WIDE)
                works.append((arena, mine["page"], mine["count"]))
        async for counts in self._progress(works):
            yield counts

    async def evict_arena(self, domain: str, name: str) -> AsyncGenerator[Counts, None]:
        """Evict all of an arena; yields as `evict`.

        Raises:
            InvalidArgumentError: no domain can have that name.
            NotFoundError: there is no such arena, or its process is away.
            RefusedError: there is nowhere for pages to be.
        """
        secrets.check_domain(domain)
        arena = next(
            (a for a in self._domains.arenas() if (a.domain.name, a.name) == (domain, name)), None
        )
        if arena is None or arena.state is not State.OPEN:
            raise NotFoundError(f"there is no arena {name!r} in domain {domain!r} on this host")
        whole = np.zeros(1, np.int64), np.array([arena.pages])
        async for counts in self._progress([(arena, *whole)]):
            yield counts

    async def evict_ranges(self, arena: Arena, first: Int64s, count: Int64s) -> Evicted:
        """Evict ranges of an arena's pages.

        Raises:
            RefusedError: there is nowhere for pages to be.
        """
        total = np.zeros(len(OUTCOME_NAMES), np.int64)
        async for counts in self._progress([(arena, first, count)]):
            total += counts
        held, spilled, kept, no_room = total.tolist()
        return held, spilled, kept, no_room

    async def _progress(self, works: Sequence[_Work]) -> AsyncGenerator[Counts, None]:
        if not self._securer.possible:
            raise NowhereError(errno.EOPNOTSUPP, _SWITCHED_OFF)
        tally = np.zeros(len(OUTCOME_NAMES), np.int64)
        task = asyncio.ensure_future(self._evict_all(works, tally))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_PROGRESS_SECONDS)
                yield _take(tally)
            task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _evict_all(self, works: Sequence[_Work], tally: Counts) -> None:
        async with asyncio.TaskGroup() as group:
            for arena, first, counts in works:
                for run, offset, length in batches(counts, _BATCH_PAGES):
                    await self._at_once.acquire()
                    pages = np.unique(expand(first[run] + offset, length))
                    task = group.create_task(self._evict_batch(arena, pages, tally))
                    task.add_done_callback(lambda _: self._at_once.release())

    async def _evict_batch(self, arena: Arena, pages: Int64s, tally: Counts) -> None:
        """Evict at most _BATCH_PAGES pages (ascending, each once), and count the outcomes."""
        domain = arena.domain
        seed = secrets.domain_seed(self._secret, domain.name)
        read = await self._promoter.read(arena, pages, seed)
        good = (read.outcomes == Outcome.MERGED) & ~are_zero(read.digests)
        outcomes = np.full(pages.size, _KEPT)
        rows = np.flatnonzero(good)
        if rows.size:
            some = _Rows(pages[rows], read.digests[rows], read.fingerprints[rows])
            outcomes[rows] = await self._let_go(arena, some, _pages(read.data, rows))
        counts = np.bincount(outcomes, minlength=len(OUTCOME_NAMES))
        tally += counts
        self.outcomes += counts

    async def _let_go(self, arena: Arena, rows: _Rows, data: bytes) -> Int64s:
        domain = arena.domain
        with domain.pins.kept(rows.digests):
            failpoint("evict.read")
            safe = await self._securer.secure(Pages(domain, rows.digests, rows.fingerprints, data))
            failpoint("evict.safe")
            outcomes = np.where(safe.held, _HELD, np.where(safe.spilled, _SPILLED, _NO_ROOM))
            go = np.flatnonzero(safe.held | safe.spilled)
            if go.size:
                self._remember_slots(arena, rows, go)
                done = await self._orders.evict(
                    arena, rows.pages[go], _pages(data, go), rows.digests[go]
                )
                failpoint("evict.gone")
                outcomes[go[done != Outcome.MERGED]] = _KEPT
        return outcomes

    def _remember_slots(self, arena: Arena, rows: _Rows, go: Int64s) -> None:
        """Let shared pages be found in their slots, as long as others map these, when they return:
        the agent compares, so that what is wrong here is not away afterwards."""
        slots = arena.map.slots(rows.pages[go])
        shared = slots != PRIVATE
        arena.domain.catalog.add(keys_of(rows.digests[go][shared]), slots[shared])


@dataclass(frozen=True)
class _Rows:
    """Pages of an arena (ascending), and what they held."""

    pages: Int64s
    digests: Digests
    fingerprints: Fingerprints


def _pages(data: Bytes, rows: Int64s) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)[rows].tobytes()


def _take(tally: Counts) -> Counts:
    counts = tally.copy()
    tally[:] = 0
    return counts


def _checked(data: bytes, arenas: Sequence[Arena | None]) -> npt.NDArray[np.void]:
    if len(data) % RUN.itemsize:
        raise InvalidArgumentError(
            f"runs has {len(data)} bytes, which is no whole number of {RUN.itemsize}-byte records"
        )
    runs = np.frombuffer(data, RUN)
    if bool((runs["arena"] >= len(arenas)).any()):
        text = f"a run names an arena that is not among the {len(arenas)} given"
        raise InvalidArgumentError(text)
    for number, arena in enumerate(arenas):
        mine = runs[runs["arena"] == number]
        pages = ARENA_PAGES_MAX if arena is None else arena.pages
        if not within(mine["page"], mine["count"], pages):
            raise InvalidArgumentError(f"a run is empty or outside arena {number} of {pages} pages")
    return runs
