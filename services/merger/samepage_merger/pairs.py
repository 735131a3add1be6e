"""Merges the candidates of one pair of arenas: a leader's pages and a follower's.

Candidates are worked off in batches. If one page of the two maps a slot, the other is replaced by
it. If neither does, the leader's page is promoted: its bytes go into a fresh slot, the leader is
replaced by that first, then the follower. If both do, by different slots, the page with the higher
number is restored and replaced by the lower: whoever decides, and however often, comes to the same
result. Where a slot has all the sharers that it may have, pages go on in another (sharers.py).

While the follower of one step is replaced, the leader maps the slots of the next, and the one
after that is read into its slots. How many steps' slots may be filled and not yet be mapped by
their leader is limited for the merger as a whole: they are memory that merging has yet to give
back. The slots of a batch follow each other, whatever other pairs do meanwhile, so that what lies
side by side in the leader stays one mapping.
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
from samepage_merger.arena import Arena
from samepage_merger.headroom import Headroom
from samepage_merger.mappings import MappingBudget
from samepage_merger.orders import DISPLACED, NO_HEADROOM, Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, batches, expand, unique_first, unique_inverse
from samepage_merger.sharers import FULL, Overflow, fits
from samepage_merger.store import StoreFullError

OUTCOMES = DISPLACED + 1
#: By number, as the API calls them.
OUTCOME_NAMES = (*(outcome.name.lower() for outcome in Outcome), "gone", "no_headroom", "displaced")
STEP_PAGES = 1024
STEPS_AHEAD = 2

_BATCH_PAGES = wire.REPLACE_PAGES_MAX
_NO_OUTCOMES: Outcomes = np.empty(0, np.uint8)

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

    def count_pages(self, row: int, outcome: int, pages: int) -> None:
        """Add pages of an arena that have one outcome."""
        self._outcomes[row, outcome] += pages

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


@dataclass(frozen=True)
class Tools:
    """What every pair needs. `steps_ahead` bounds the memory that merging takes."""

    orders: Orders
    headroom: Headroom
    mappings: MappingBudget
    overflow: Overflow
    steps_ahead: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STEPS_AHEAD))


class _Background:
    """Runs one coroutine at a time behind its caller."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def start(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Start `work` when the one before is done."""
        await self.finish()
        self._task = asyncio.ensure_future(work())

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
        self._steps_ahead = tools.steps_ahead
        self._leader = leader
        self._follower = follower
        self._tally = tally
        self._headroom = tools.headroom
        self._overflow = tools.overflow
        self._steps_taken = 0
        self._pages_taken = 0

    async def merge(self, leader_first: Int64s, follower_first: Int64s, counts: Int64s) -> None:
        """Merge runs of pages; they must lie within their arenas."""
        try:
            async with _Background() as following:
                for run, offset, length in batches(counts, _BATCH_PAGES):
                    leader_pages = expand(leader_first[run] + offset, length)
                    follower_pages = expand(follower_first[run] + offset, length)
                    async with self._leader.arena.promoting:
                        await self._batch(leader_pages, follower_pages, following)
                    await asyncio.sleep(0)
                await following.finish()
        finally:
            self._headroom.give_back(self._pages_taken)

    async def _batch(
        self, leader_pages: Int64s, follower_pages: Int64s, following: _Background
    ) -> None:
        leader_pages, follower_pages = self._admit(leader_pages, follower_pages)
        private = (self._leader.arena.map.slots(leader_pages) == PRIVATE) & (
            self._follower.arena.map.slots(follower_pages) == PRIVATE
        )
        if not private.all():
            ready = leader_pages[~private], follower_pages[~private]
            await following.start(functools.partial(self._link, *ready))
            leader_pages, follower_pages = leader_pages[private], follower_pages[private]
        if self._leader.arena is self._follower.arena:
            leader_pages, follower_pages = self._without_chains(leader_pages, follower_pages)
        if leader_pages.size:
            await self._promote(leader_pages, follower_pages, following)

    def _admit(self, leader_pages: Int64s, follower_pages: Int64s) -> tuple[Int64s, Int64s]:
        """Return the pairs that are to be merged: not those that are one already, nor those whose
        merge might not be undone."""
        ours = self._leader.arena.map.slots(leader_pages)
        apart = (ours == PRIVATE) | (ours != self._follower.arena.map.slots(follower_pages))
        if self._leader.arena is self._follower.arena:
            apart &= leader_pages != follower_pages
        if not apart.all():
            self._tally.done(apart.size - int(np.count_nonzero(apart)))
            leader_pages, follower_pages = leader_pages[apart], follower_pages[apart]
        granted = self._headroom.take(leader_pages.size)
        self._pages_taken += granted
        refused = leader_pages.size - granted
        if refused:
            self._tally.count(self._follower.row, np.full(refused, NO_HEADROOM, np.uint8))
            self._tally.done(refused)
        return leader_pages[:granted], follower_pages[:granted]

    def _through(self, pairs: int) -> None:
        self._pages_taken -= pairs
        self._headroom.give_back(pairs)
        self._tally.done(pairs)

    def _without_chains(
        self, leader_pages: Int64s, follower_pages: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Leave out pairs whose leader follows another: it gets that one's slot, not its own."""
        chained = np.isin(leader_pages, follower_pages)
        busy = np.full(int(np.count_nonzero(chained)), Outcome.BUSY, np.uint8)
        self._tally.count(self._follower.row, busy)
        self._through(busy.size)
        return leader_pages[~chained], follower_pages[~chained]

    async def _promote(
        self, leader_pages: Int64s, follower_pages: Int64s, following: _Background
    ) -> None:
        """Give the leader's pages slots, which follow each other, and have both map them."""
        domain = self._leader.arena.domain
        pages, of_pair = unique_inverse(leader_pages)
        slots = domain.store.reserve(pages.size) + np.arange(pages.size)
        hold = domain.books.add(slots)
        try:
            steps = _steps(_Step(pages, slots, leader_pages, follower_pages, of_pair))
            stored = await self._store(steps[0])
            for step, next_step in itertools.zip_longest(steps, steps[1:]):
                outcomes, stored = await _both(self._publish(step, stored), self._store(next_step))
                await following.start(functools.partial(self._follow, step, outcomes))
        finally:
            while self._steps_taken:
                self._give_back_step()
            domain.free(domain.books.release(hold))

    async def _store(self, step: _Step | None) -> Outcomes:
        """Fill the step's slots with the leader's bytes; return what became of each page.

        One of `steps_ahead` is taken, and given back by `_publish`.
        """
        if step is None:
            return _NO_OUTCOMES
        leader = self._leader.arena
        store = leader.domain.store

        def keep(low: int, outcomes: Outcomes, data: memoryview) -> None:
            slot = int(step.slots[low])
            if not outcomes.any():
                store.write(slot, data)
                return
            for at in np.flatnonzero(outcomes == Outcome.MERGED).tolist():
                store.write(slot + at, data[at * wire.PAGE_SIZE : (at + 1) * wire.PAGE_SIZE])

        await self._steps_ahead.acquire()
        self._steps_taken += 1
        outcomes = np.full(step.pages.size, Outcome.BUSY, np.uint8)
        room = store.room(step.pages.size)
        with contextlib.suppress(StoreFullError):
            outcomes[:room] = await self._orders.read(leader, step.pages[:room], keep)
        return outcomes

    async def _publish(self, step: _Step, outcomes: Outcomes) -> Outcomes:
        """Let the leader map the slots that were filled; return what became of each page."""
        leader = self._leader.arena
        try:
            private = leader.map.slots(step.pages) == PRIVATE
            good = private & (outcomes == Outcome.MERGED)
            if good.all():
                outcomes = await self._orders.replace(leader, step.pages, step.slots)
            else:
                outcomes = outcomes.copy()
                outcomes[good] = await self._orders.replace(
                    leader, step.pages[good], step.slots[good]
                )
        finally:
            self._give_back_step()
        self._tally.count(self._leader.row, outcomes[private])
        return outcomes

    def _give_back_step(self) -> None:
        self._steps_taken -= 1
        self._steps_ahead.release()

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
        if ours.all() and not theirs.any():
            await self._replace(follower, follower_pages, ours)
        else:
            neither = (ours == PRIVATE) & (theirs == PRIVATE)
            to_follower = (ours != PRIVATE) & (theirs == PRIVATE)
            to_leader = (ours == PRIVATE) & (theirs != PRIVATE)
            self._count_neither(neither, failed)
            await asyncio.gather(
                self._replace(follower, follower_pages[to_follower], ours[to_follower]),
                self._replace(leader, leader_pages[to_leader], theirs[to_leader]),
            )
            at = np.flatnonzero((ours != theirs) & ~(neither | to_follower | to_leader))
            cap = self._orders.sharers_max()
            at = at[fits(leader.arena.domain, np.minimum(ours[at], theirs[at]), cap)]
            for low in range(0, at.size, STEP_PAGES):
                some = at[low : low + STEP_PAGES]
                await self._converge(leader_pages[some], follower_pages[some])
        self._through(leader_pages.size)

    def _count_neither(self, neither: npt.NDArray[np.bool_], failed: Outcomes | None) -> None:
        outcomes = np.full(int(np.count_nonzero(neither)), Outcome.BUSY, np.uint8)
        if failed is not None:
            why = failed[neither]
            outcomes[(why == Outcome.DIFFERS) | (why == Outcome.ABSENT)] = Outcome.DIFFERS
        self._tally.count(self._follower.row, outcomes)

    async def _replace(self, side: Side, pages: Int64s, slots: Int64s) -> None:
        pages, at = unique_first(pages)
        if pages.size:
            slots = slots[at]
            outcomes = await self._orders.replace(side.arena, pages, slots)
            full = np.flatnonzero(outcomes == FULL)
            if full.size:
                outcomes[full] = await self._overflow.place(side.arena, pages[full], slots[full])
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
class _Step:
    """Pairs of which neither page maps a slot.

    Attributes:
        pages: the leader's, ascending, each once.
        slots: for each of them, consecutive.
        of_pair: for each pair, ascending, where its leader's page is in `pages`.
    """

    pages: Int64s
    slots: Int64s
    leader_pages: Int64s
    follower_pages: Int64s
    of_pair: npt.NDArray[np.intp]


def _steps(whole: _Step) -> list[_Step]:
    """Cut into steps of at most STEP_PAGES pages of the leader; pairs may be in any order."""
    leader_pages, follower_pages, of_pair = whole.leader_pages, whole.follower_pages, whole.of_pair
    if not bool((of_pair[1:] >= of_pair[:-1]).all()):
        order = np.argsort(of_pair, kind="stable")
        leader_pages, follower_pages = leader_pages[order], follower_pages[order]
        of_pair = of_pair[order]
    steps = []
    for low in range(0, whole.pages.size, STEP_PAGES):
        first, end = np.searchsorted(of_pair, (low, low + STEP_PAGES)).tolist()
        steps.append(
            _Step(
                whole.pages[low : low + STEP_PAGES],
                whole.slots[low : low + STEP_PAGES],
                leader_pages[first:end],
                follower_pages[first:end],
                of_pair[first:end] - low,
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
