"""Moves an arena here: rounds while its writers go on, a freeze, and the hand-over.

Theory. What a clone has brought is only the first round. While it came the source's application
has written, so the snapshot is asked for what changed, again and again; each round takes less time
than the one before, as long as pages come faster than they are written. When one took no longer
than half of the freeze that is allowed (or when it gets no better), the source is frozen: nobody
can write there, and the last round brings the rest.

Then this host has every byte, and asks the source to leave. From the moment of asking until the
answer nobody can know whose arena it is, so that is noted in a file first; whatever happens then
(the answer lost, this merger killed, the agent's connection broken) it is asked again until it is
known. "Left" makes the arena this host's; "stayed" ends it here. The source leaves only while it is
frozen, so never more than one side can use the arena.

Pages that change are pages that this host's agent has mapped already. They are let away once more
by EVICT, which compares them with what they hold, with the digest of what they shall hold; then
they land like any other.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator

import numpy as np
import structlog

from samepage.daemon import wire
from samepage.daemon.failpoints import failpoint
from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena
from samepage_merger.cluster.away import Mask
from samepage_merger.cluster.digests import are_zero
from samepage_merger.cluster.landing import Chunk, Landing, check
from samepage_merger.cluster.source import Snapshot, Stretch
from samepage_merger.domains import RefusedError
from samepage_merger.orders import Orders
from samepage_merger.runs import Int64s

_ROUNDS_MAX = 16
# Of one round to the next: when changes do not get fewer than this, more rounds are no use.
_SHRINKS = 0.8
_PART_PAGES = min(wire.READ_PAGES_MAX, wire.EVICT_PAGES_MAX)

log = structlog.get_logger(__name__)


class Migration:
    """The rounds of one migration, after the first.

    Args:
        landing: has brought the first round.
        seconds: for which the writers may have to wait.
    """

    def __init__(
        self, orders: Orders, snapshot: Snapshot, arena: Arena, landing: Landing, seconds: float
    ) -> None:
        self._orders = orders
        self._snapshot = snapshot
        self._arena = arena
        self._landing = landing
        self._seconds = seconds

    async def settle(self) -> None:
        """Bring what is written meanwhile, until little enough is left.

        Raises:
            RefusedError: it cannot be brought.
        """
        before = self._arena.pages
        for _ in range(_ROUNDS_MAX):
            started = time.monotonic()
            changed = await self._bring(self._snapshot.round())
            failpoint("migrate.round")
            took = time.monotonic() - started
            log.debug("a round of a migration", arena=self._arena.name, pages=changed, seconds=took)
            if took <= self._seconds / 2 or changed > before * _SHRINKS:
                return
            before = changed

    async def freeze(self) -> float:
        """Stop the writers, and bring the rest; return when they were stopped, by time.monotonic.

        Raises:
            RefusedError: it cannot be brought in time; the writers may go on.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds):
                await self._bring(self._snapshot.freeze(max(1, round(self._seconds * 1000))))
        except TimeoutError:
            raise RefusedError(errno.ETIMEDOUT, self._too_slow()) from None
        failpoint("migrate.frozen")
        return started

    def _too_slow(self) -> str:
        return (
            f"what is written at {self._snapshot.host!r} meanwhile cannot be moved within"
            f" {self._seconds * 1000:.0f} ms: the arena stayed there. Allow a longer freeze, or"
            " try again when there are fewer writes"
        )

    async def _bring(self, stretches: AsyncIterator[Stretch]) -> int:
        """Bring pages that changed; return how many."""
        changed = next_page = 0
        async for stretch in stretches:
            if stretch.first < next_page:
                # Told of again: what was told of it before must be here first.
                await self._landing.finish()
            next_page = stretch.first + len(stretch.digests)
            chunk = Chunk(stretch.pages, stretch.digests, stretch.fingerprints)
            for low in range(0, chunk.pages.size, _PART_PAGES):
                await self._change(chunk[low : low + _PART_PAGES])
            changed += chunk.pages.size
        await self._landing.finish()
        return changed

    async def _change(self, chunk: Chunk) -> None:
        """Let pages hold what they shall hold now."""
        data, present = await self._read(chunk.pages)
        zero = are_zero(chunk.digests)
        evicted = chunk[present]
        if evicted.pages.size:
            check(await self._orders.evict(self._arena, evicted.pages, data, evicted.digests))
        absent = chunk[~present & ~zero]
        if absent.pages.size:
            check(await self._orders.away(self._arena, absent.pages, absent.digests))
        cleared = chunk.pages[present & zero]
        if cleared.size:
            zeros = bytes(cleared.size * wire.PAGE_SIZE)
            check(await self._orders.fill(self._arena, cleared, zeros))
        await self._landing.take(chunk[~zero])

    async def _read(self, pages: Int64s) -> tuple[bytearray, Mask]:
        """Return the bytes of those pages that are not absent, and which these are."""
        data = bytearray()

        def keep(low: int, outcomes: Outcomes, window: memoryview) -> None:
            for row in np.flatnonzero(outcomes == Outcome.MERGED).tolist():
                data.extend(window[row * wire.PAGE_SIZE : (row + 1) * wire.PAGE_SIZE])

        outcomes = await self._orders.read(self._arena, pages, keep)
        check(outcomes[outcomes != Outcome.ABSENT])
        return data, outcomes == Outcome.MERGED
