"""Brings away pages back: the one way in which they come to be filled.

Theory. Each arena has two lines of pages that somebody wants. In the first are pages that a thread
waits for, with a few of those that follow; in the second the rest of what was asked for. Each line
is worked off in batches of its own, one at a time, so that nobody waits behind a long read ahead.
A batch is: the digests of those pages that are (still) away, their bytes from wherever they are
(supply.py), and an order to fill them.

Pages whose bytes could not be had wait, and are tried again, more and more slowly, for as long as
it takes. Only where everybody who might have a page has said that he has not, again and again for
`lost_seconds`, it is lost: it is poisoned, so that who touches it gets an error, and never zeros.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from samepage.daemon import wire
from samepage.daemon.failpoints import failpoint
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena, State
from samepage_merger.cluster.away import Bytes, Digests
from samepage_merger.domains import Domain
from samepage_merger.orders import Orders
from samepage_merger.runs import Int64s

#: Of each request, how many pages at its start are wanted most.
FIRST_PAGES = 16

_BATCH_PAGES = wire.READ_PAGES_MAX
_RETRY_SECONDS = 0.05
_RETRY_SECONDS_MAX = 5.0

log = structlog.get_logger(__name__)


class Whereabouts(enum.IntEnum):
    """What is known of a page's bytes."""

    FOUND = 0
    #: Somebody who may have them did not answer.
    UNKNOWN = 1
    #: Everybody who may have had them says that he has not.
    LOST = 2


@dataclass(frozen=True)
class Supplied:
    """Of each digest asked for the whereabouts, and the bytes of those found, in order."""

    whereabouts: npt.NDArray[np.uint8]
    data: Bytes


class Supply(Protocol):
    """Where the bytes of digests come from; everything that it gives was checked."""

    async def get(self, domain: Domain, digests: Digests) -> Supplied:
        """Return the pages with these digests; a digest may be named more than once."""


class Returner:
    """Brings pages back.

    Args:
        lost_seconds: for how long a page must be lost before it is.

    Attributes:
        returned, poisoned: pages since start.
    """

    def __init__(self, orders: Orders, supply: Supply, lost_seconds: float) -> None:
        self._orders = orders
        self._supply = supply
        self._lost_seconds = lost_seconds
        self._lines: dict[tuple[Arena, bool], _Line] = {}
        self._retries: set[asyncio.Task[None]] = set()
        self.returned = 0
        self.poisoned = 0

    @property
    def waiting(self) -> int:
        """How many pages are wanted now."""
        return sum(len(line) for line in self._lines.values())

    def fetch(self, arena: Arena, pages: Int64s) -> None:
        """Bring away pages, in this order; those at the start are wanted most."""
        self._want(arena, pages[:FIRST_PAGES], first=True)
        self._want(arena, pages[FIRST_PAGES:], first=False)

    async def bring(self, arena: Arena, pages: Int64s) -> int:
        """Try once to bring away pages (ascending) back now; return how many came."""
        came = 0
        for low in range(0, pages.size, _BATCH_PAGES):
            part = pages[low : low + _BATCH_PAGES]
            left = await self._bring(arena, _Batch(part, np.zeros(part.size)))
            came += part.size - left.pages.size
        return came

    async def close(self) -> None:
        """End; what is away stays away."""
        tasks = [*self._retries, *(line.task for line in self._lines.values())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _want(self, arena: Arena, pages: Int64s, *, first: bool) -> None:
        self._queue(arena, first, _Batch(pages, np.zeros(pages.size)))

    def _queue(self, arena: Arena, first: bool, batch: _Batch) -> None:
        if not batch.pages.size:
            return
        line = self._lines.get((arena, first))
        if line is None:
            line = _Line()
            self._lines[arena, first] = line
            line.task = asyncio.ensure_future(self._work_off(arena, first, line))
            line.task.add_done_callback(self._worked_off)
        line.batches.append(batch)

    async def _work_off(self, arena: Arena, first: bool, line: _Line) -> None:
        try:
            while line.batches:
                batch = line.take()
                left = await self._bring(arena, batch)
                if left.pages.size:
                    self._retry(arena, first, left)
        finally:
            del self._lines[arena, first]

    def _worked_off(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("bringing pages back failed", exc_info=error)

    def _retry(self, arena: Arena, first: bool, batch: _Batch) -> None:
        """Want a batch again after a while, unless the arena is gone."""

        async def later() -> None:
            await asyncio.sleep(min(_RETRY_SECONDS * 2 ** min(batch.tries, 10), _RETRY_SECONDS_MAX))
            if arena.state is not State.CLOSED:
                self._queue(arena, first, batch)

        task = asyncio.ensure_future(later())
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    async def _bring(self, arena: Arena, batch: _Batch) -> _Batch:
        """Bring pages; return those that are still away."""
        batch = batch[arena.away.contains(batch.pages)]
        if not batch.pages.size:
            return batch
        digests = arena.away.digests(batch.pages)
        with arena.domain.pins.kept(digests):
            supplied = await self._supply.get(arena.domain, digests)
            failpoint("return.supplied")
            found = supplied.whereabouts == Whereabouts.FOUND
            outcomes = await self._orders.fill(arena, batch.pages[found], supplied.data)
        failpoint("return.filled")
        self.returned += int(np.count_nonzero(outcomes == Outcome.MERGED))
        now = time.monotonic()
        lost = supplied.whereabouts == Whereabouts.LOST
        since = np.where(lost, np.where(batch.lost_since == 0, now, batch.lost_since), 0.0)
        given_up = lost & (since <= now - self._lost_seconds)
        if given_up.any():
            await self._poison(arena, batch.pages[given_up])
        return _Batch(batch.pages, since, batch.tries + 1)[arena.away.contains(batch.pages)]

    async def _poison(self, arena: Arena, pages: Int64s) -> None:
        outcomes = await self._orders.poison(arena, pages)
        poisoned = int(np.count_nonzero(outcomes == Outcome.MERGED))
        self.poisoned += poisoned
        if poisoned:
            log.error(
                "pages are lost: no host has them any more, and they are not spilled; who touches"
                " them gets an error",
                domain=arena.domain.name,
                arena=arena.name,
                pages=poisoned,
                first_page=int(pages[0]),
            )


@dataclass(frozen=True)
class _Batch:
    """Pages (ascending, each once), since when each is lost (0: it is not), and how often it was
    tried."""

    pages: Int64s
    lost_since: npt.NDArray[np.float64]
    tries: int = 0

    def __getitem__(self, rows: npt.NDArray[np.bool_]) -> _Batch:
        return _Batch(self.pages[rows], self.lost_since[rows], self.tries)


class _Line:
    """Batches that are worked off one after the other."""

    def __init__(self) -> None:
        self.batches: deque[_Batch] = deque()
        self.task: asyncio.Task[None]

    def __len__(self) -> int:
        return sum(batch.pages.size for batch in self.batches)

    def take(self) -> _Batch:
        """Return the next pages in the order of their wanting, ascending; those that were never
        tried are taken together."""
        batch = self.batches.popleft()
        while not batch.tries and self.batches and not self.batches[0].tries:
            if batch.pages.size >= _BATCH_PAGES:
                break
            other = self.batches.popleft()
            pages = np.concatenate((batch.pages, other.pages))
            batch = _Batch(pages, np.zeros(pages.size))
        rest = np.arange(batch.pages.size) >= _BATCH_PAGES
        if rest.any():
            self.batches.appendleft(batch[rest])
        pages, at = np.unique(batch.pages[~rest], return_index=True)
        return _Batch(pages, batch.lost_since[~rest][at], batch.tries)
