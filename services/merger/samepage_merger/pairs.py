"""Merges the candidates of one pair of arenas: a leader's pages and a follower's.

Candidates are worked off in batches. If one page of the two maps a slot, the other is replaced by
it. If neither does, the leader's page is promoted: its bytes go into a fresh slot, the leader is
replaced by that first, then the follower. If both do, by different slots, the page with the higher
number is restored and replaced by the lower: whoever decides, and however often, comes to the same
result.

While the follower of one step is replaced, the leader's next step is promoted and the one after
that is read. How many steps may be promoted and not yet followed is limited for the merger as a
whole, since their slots are memory that merging has yet to give back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import Outcome
from samepage_merger.books import NO_SLOTS
from samepage_merger.domains import Arena, Domain
from samepage_merger.orders import GONE, Bytes, Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, batches, expand, unique_first, unique_inverse
from samepage_merger.slots import Fingerprints
from samepage_merger.store import StoreFullError

OUTCOMES = GONE + 1
STEP_PAGES = 256
STEPS_AHEAD = 3

_BATCH_PAGES = wire.REPLACE_PAGES_MAX

Fingerprint = Callable[[Bytes, int, int], Fingerprints]
Counts = npt.NDArray[np.int64]

A = TypeVar("A")
B = TypeVar("B")


class Tally:
    """Counts of one call of merge: pages by arena and outcome, and pages that are through."""

    def __init__(self, arenas: int) -> None:
        self._outcomes = np.zeros((arenas, OUTCOMES), np.int64)
        self._pages_done = 0

    def count(self, row: int, outcomes: Outcomes) -> None:
        """Add the outcomes of some pages of an arena."""
        self._outcomes[row] += np.bincount(outcomes, minlength=OUTCOMES)

    def count_gone(self, row: int, pages: int) -> None:
        """Add pages of an arena that is gone."""
        self._outcomes[row, GONE] += pages

    def done(self, pages: int) -> None:
        """Add pages that are through."""
        self._pages_done += pages

    def take(self) -> tuple[Counts, int]:
        """Return the counts since the last call."""
        taken = self._outcomes.copy(), self._pages_done
        self._outcomes[:] = 0
        self._pages_done = 0
        return taken


@dataclass(frozen=True)
class Side:
    """One of the two arenas of a candidate, and the row where its outcomes are counted."""

    arena: Arena
    row: int


class Buffers:
    """Arrays for the pages of a step, used again: new memory costs more than the copy."""

    def __init__(self) -> None:
        self._free: list[Bytes] = []

    def take(self) -> Bytes:
        """Return an array of STEP_PAGES pages with any content."""
        if self._free:
            return self._free.pop()
        return np.empty((STEP_PAGES, wire.PAGE_SIZE), np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """The caller does not use it any more."""
        if len(self._free) < STEPS_AHEAD:
            self._free.append(buffer)


@dataclass(frozen=True)
class Tools:
    """What every pair needs. `steps_ahead` bounds the memory that merging takes."""

    orders: Orders
    fingerprint: Fingerprint
    buffers: Buffers = field(default_factory=Buffers)
    steps_ahead: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STEPS_AHEAD))


class _Background:
    """Runs one coroutine at a time behind its caller."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def start(
        self, work: Callable[[], Coroutine[object, object, None]], done: Callable[[], None]
    ) -> None:
        """Start `work` when the one before is done; `done` is called after it, come what may."""
        with contextlib.ExitStack() as stack:
            stack.callback(done)
            await self.finish()
            self._task = asyncio.ensure_future(work())
            finished = stack.pop_all().close
            self._task.add_done_callback(lambda _: finished())

    async def finish(self) -> None:
        """Wait for what was started."""
        if self._task is not None:
            await self._task

    async def __aenter__(self) -> _Background:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})


class PairMerge:
    """One pair of arenas, which may be one and the same."""

    def __init__(self, tools: Tools, leader: Side, follower: Side, tally: Tally) -> None:
        self._orders = tools.orders
        self._fingerprint = tools.fingerprint
        self._buffers = tools.buffers
        self._steps_ahead = tools.steps_ahead
        self._leader = leader
        self._follower = follower
        self._tally = tally

    async def merge(self, leader_first: Int64s, follower_first: Int64s, counts: Int64s) -> None:
        """Merge runs of pages; they must lie within their arenas."""
        async with _Background() as following:
            for run, offset, length in batches(counts, _BATCH_PAGES):
                leader_pages = expand(leader_first[run] + offset, length)
                follower_pages = expand(follower_first[run] + offset, length)
                async with self._leader.arena.promoting:
                    await self._batch(leader_pages, follower_pages, following)
                await asyncio.sleep(0)
            await following.finish()

    async def _batch(
        self, leader_pages: Int64s, follower_pages: Int64s, following: _Background
    ) -> None:
        if self._leader.arena is self._follower.arena:
            other = leader_pages != follower_pages
            self._tally.done(leader_pages.size - int(np.count_nonzero(other)))
            leader_pages, follower_pages = leader_pages[other], follower_pages[other]
        private = (self._leader.arena.map.slots(leader_pages) == PRIVATE) & (
            self._follower.arena.map.slots(follower_pages) == PRIVATE
        )
        ready = leader_pages[~private], follower_pages[~private]
        if ready[0].size:
            await following.start(functools.partial(self._link, *ready), _nothing)
        candidates = leader_pages[private], follower_pages[private]
        if self._leader.arena is self._follower.arena:
            candidates = self._without_chains(*candidates)
        await self._promote(_steps(*candidates), following)

    def _without_chains(
        self, leader_pages: Int64s, follower_pages: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Leave out pairs whose leader follows another: it gets that one's slot, not its own."""
        chained = np.isin(leader_pages, follower_pages)
        busy = np.full(int(np.count_nonzero(chained)), Outcome.BUSY, np.uint8)
        self._tally.count(self._follower.row, busy)
        self._tally.done(busy.size)
        return leader_pages[~chained], follower_pages[~chained]

    async def _promote(self, steps: list[_Step], following: _Background) -> None:
        read = await self._read(steps[0]) if steps else None
        for step, next_step in itertools.zip_longest(steps, steps[1:]):
            with contextlib.ExitStack() as stack:
                await self._steps_ahead.acquire()
                stack.callback(self._steps_ahead.release)
                publish = self._publish(step, read)
                outcomes, read = await _both(publish, self._read(next_step))
                done = stack.pop_all().close
            await following.start(functools.partial(self._follow, step, outcomes), done)

    async def _read(self, step: _Step | None) -> _Read | None:
        """Return the leader's bytes, or None when there is no step, or no room for its slots."""
        leader = self._leader.arena
        if step is None or not leader.domain.store.has_room(step.pages.size):
            return None
        data = self._buffers.take()
        return _Read(data, await self._orders.read(leader, step.pages, data))

    async def _publish(self, step: _Step, read: _Read | None) -> Outcomes:
        """Give the leader's pages slots, and let it map them; return what became of each."""
        if read is None:
            outcomes = np.full(step.pages.size, Outcome.BUSY, np.uint8)
            self._tally.count(self._leader.row, outcomes)
            return outcomes
        leader, outcomes = self._leader.arena, read.outcomes
        private = leader.map.slots(step.pages) == PRIVATE
        good = np.flatnonzero(private & (outcomes == Outcome.MERGED))
        rows = read.data[: good.size] if good.size == step.pages.size else read.data[good]
        try:
            slots, hold = self._store(leader.domain, rows)
        except StoreFullError:
            outcomes[good] = Outcome.BUSY
        else:
            self._buffers.give_back(read.data)
            try:
                outcomes[good] = await self._orders.replace(leader, step.pages[good], slots)
            finally:
                leader.domain.free(leader.domain.books.release(hold))
        self._tally.count(self._leader.row, outcomes[private])
        return outcomes

    def _store(self, domain: Domain, rows: Bytes) -> tuple[Int64s, int]:
        """Return new slots with the bytes of these pages, and the hold that keeps them.

        Raises:
            StoreFullError: there is no room.
        """
        if not len(rows):
            return NO_SLOTS, domain.books.hold(NO_SLOTS)
        first = domain.store.allocate(len(rows))
        domain.store.write(first, rows.data.cast("B"))
        slots = np.arange(first, first + len(rows))
        prints = self._fingerprint(rows, len(rows), domain.seed)
        return slots, domain.books.add(slots, prints)

    async def _follow(self, step: _Step, outcomes: Outcomes) -> None:
        await self._link(step.leader_pages, step.follower_pages, outcomes[step.of_pair])

    async def _link(
        self, leader_pages: Int64s, follower_pages: Int64s, failed: Outcomes | None = None
    ) -> None:
        """Let both pages of each pair map the slot that one of them maps.

        `failed` says what became of the leader's page where neither does.
        """
        leader, follower = self._leader, self._follower
        ours = leader.arena.map.slots(leader_pages)
        theirs = follower.arena.map.slots(follower_pages)
        neither = (ours == PRIVATE) & (theirs == PRIVATE)
        to_follower = (ours != PRIVATE) & (theirs == PRIVATE)
        to_leader = (ours == PRIVATE) & (theirs != PRIVATE)
        differ = (ours != PRIVATE) & (theirs != PRIVATE) & (ours != theirs)
        self._count_neither(neither, failed)
        await asyncio.gather(
            self._replace(follower, follower_pages[to_follower], ours[to_follower]),
            self._replace(leader, leader_pages[to_leader], theirs[to_leader]),
        )
        at = np.flatnonzero(differ)
        for low in range(0, at.size, STEP_PAGES):
            some = at[low : low + STEP_PAGES]
            await self._converge(leader_pages[some], follower_pages[some])
        self._tally.done(leader_pages.size)

    def _count_neither(self, neither: npt.NDArray[np.bool_], failed: Outcomes | None) -> None:
        outcomes = np.full(int(np.count_nonzero(neither)), Outcome.BUSY, np.uint8)
        if failed is not None:
            why = failed[neither]
            outcomes[(why == Outcome.DIFFERS) | (why == Outcome.ABSENT)] = Outcome.DIFFERS
        self._tally.count(self._follower.row, outcomes)

    async def _replace(self, side: Side, pages: Int64s, slots: Int64s) -> None:
        pages, at = unique_first(pages)
        if pages.size:
            outcomes = await self._orders.replace(side.arena, pages, slots[at])
            self._tally.count(side.row, outcomes)

    async def _converge(self, leader_pages: Int64s, follower_pages: Int64s) -> None:
        """Let pairs that map different slots map the lower one."""
        books = self._leader.arena.domain.books
        for side, pages in ((self._leader, leader_pages), (self._follower, follower_pages)):
            ours = self._leader.arena.map.slots(leader_pages)
            theirs = self._follower.arena.map.slots(follower_pages)
            lower = np.minimum(ours, theirs)
            wrong = (side.arena.map.slots(pages) > lower) & (lower != PRIVATE)
            some, at = unique_first(pages[wrong])
            slots = lower[wrong][at]
            hold = books.hold(slots)
            try:
                outcomes = await self._orders.restore(side.arena, some)
                restored = outcomes == Outcome.MERGED
                self._tally.count(side.row, outcomes[~restored])
                await self._replace(side, some[restored], slots[restored])
            finally:
                self._leader.arena.domain.free(books.release(hold))


@dataclass(frozen=True)
class _Read:
    """The leader's bytes of a step, a row a page, and what became of each page."""

    data: Bytes
    outcomes: Outcomes


@dataclass(frozen=True)
class _Step:
    """Pairs of which neither page maps a slot, with at most STEP_PAGES pages of the leader.

    Attributes:
        pages: the leader's, ascending, each once.
        of_pair: for each pair, where its leader's page is in `pages`.
    """

    pages: Int64s
    leader_pages: Int64s
    follower_pages: Int64s
    of_pair: npt.NDArray[np.intp]


def _steps(leader_pages: Int64s, follower_pages: Int64s) -> list[_Step]:
    pages, of_pair = unique_inverse(leader_pages)
    steps = []
    for low in range(0, pages.size, STEP_PAGES):
        within = (of_pair >= low) & (of_pair < low + STEP_PAGES)
        steps.append(
            _Step(
                pages[low : low + STEP_PAGES],
                leader_pages[within],
                follower_pages[within],
                of_pair[within] - low,
            )
        )
    return steps


async def _both(
    first: Coroutine[object, object, A], second: Coroutine[object, object, B]
) -> tuple[A, B]:
    """Run both, the first one first; if one fails or this is cancelled, neither goes on."""
    async with asyncio.TaskGroup() as group:
        one = group.create_task(first)
        other = group.create_task(second)
    return one.result(), other.result()


def _nothing() -> None:
    """What is to be done after a step that took no memory."""
