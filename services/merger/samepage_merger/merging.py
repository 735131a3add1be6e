"""Takes candidates, and makes them one; knows nothing of gRPC.

Nothing here has to be right for memory to be safe: what is equal is decided by the process that
owns the page, and the books follow what agents say. So candidates of different calls run side by
side, and the only lock is one that keeps two of them from promoting the same leader's pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from samepage.daemon import heap, wire
from samepage.daemon.wire import Outcome
from samepage.errors import InvalidArgumentError
from samepage_merger.arena import Arena
from samepage_merger.orders import DISPLACED, GONE
from samepage_merger.pagemap import PRIVATE
from samepage_merger.pairs import OUTCOMES, Counts, PairMerge, Side, Tally, Tools
from samepage_merger.runs import batches, expand, unique, within

RUN = np.dtype(
    [
        ("leader", "<u4"),
        ("follower", "<u4"),
        ("leader_page", "<u8"),
        ("follower_page", "<u8"),
        ("count", "<u8"),
    ]
)
ZERO_LEADER = 0xFFFF_FFFF

_ANY_ARENA_PAGES = 2**36
_PAIRS_AT_ONCE = 4
_PROGRESS_SECONDS = 0.1

Runs = npt.NDArray[np.void]


@dataclass(frozen=True)
class Progress:
    """What happened since the last one: a row an arena, a column an outcome (GONE the last)."""

    outcomes: Counts
    pages_done: int


class FindArena(Protocol):
    """Looks up an open arena by its agent's number and its own."""

    def __call__(self, agent: bytes, number: int, /) -> Arena | None: ...


class MergeEngine:
    """Merges candidates.

    Args:
        find: looks up an arena.
        tools: what the work is done with.

    Attributes:
        candidates: pages that were to be merged so far.
        outcomes: what became of pages so far, by number.
    """

    def __init__(self, find: FindArena, tools: Tools) -> None:
        self._find = find
        self._tools = tools
        self.candidates = 0
        self.outcomes = np.zeros(OUTCOMES, np.int64)

    async def merge(
        self, domain: str, keys: Sequence[tuple[bytes, int]], runs: bytes
    ) -> AsyncGenerator[Progress, None]:
        """Make candidates one; yields the progress now and then, and at the end.

        Args:
            domain: of all the arenas; those of another count as gone.
            keys: agent number and arena number of each.
            runs: records of RUN.

        Raises:
            InvalidArgumentError: a run is malformed, or outside its arena.
        """
        sides = [self._side(domain, row, *key) for row, key in enumerate(keys)]
        records = _checked(runs, sides)
        self.candidates += int(records["count"].sum())
        tally = Tally(len(sides))
        work = asyncio.ensure_future(self._merge_all(sides, records, tally))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=_PROGRESS_SECONDS)
                if not work.done():
                    yield self._progress(tally)
            work.result()
            yield self._progress(tally)
        finally:
            work.cancel()
            await asyncio.wait({work})
            self._progress(tally)
            heap.trim()

    def _progress(self, tally: Tally) -> Progress:
        """What happened since the last one; also counted for the merger as a whole."""
        progress = Progress(*tally.take())
        self.outcomes += progress.outcomes.sum(axis=0)
        return progress

    def _side(self, domain: str, row: int, agent: bytes, number: int) -> Side | None:
        arena = self._find(agent, number)
        return None if arena is None or arena.domain.name != domain else Side(arena, row)

    async def _merge_all(self, sides: Sequence[Side | None], records: Runs, tally: Tally) -> None:
        """Merge the longest runs first, as far as mappings go; zero pages take none."""
        zero = records["leader"] == ZERO_LEADER
        await self._merge_pairs(sides, records[zero], tally)
        budget = self._tools.mappings
        arenas = [None if side is None else side.arena for side in sides]
        rest = records[~zero]
        rest = rest[np.argsort(-rest["count"].astype(np.int64), kind="stable")]
        while rest.size:
            chosen = budget.choose(arenas, rest)
            await self._merge_pairs(sides, rest[chosen], tally)
            rest = rest[~chosen]
            if chosen.any():
                continue
            displaced = await budget.make_room(arenas, rest)
            for row, pages in displaced.items():
                tally.count_pages(row, DISPLACED, pages)
            if not displaced:
                break
        for row, arena in enumerate(arenas):
            self._count_refused(row, arena, rest, tally)
        tally.done(int(rest["count"].sum()))

    def _count_refused(self, row: int, arena: Arena | None, runs: Runs, tally: Tally) -> None:
        """Count an arena's pages in runs that there were no mappings for, on either side."""
        leads, follows = runs[runs["leader"] == row], runs[runs["follower"] == row]
        pages = np.concatenate(
            (
                expand(leads["leader_page"], leads["count"]),
                expand(follows["follower_page"], follows["count"]),
            )
        )
        if arena is None:
            tally.count_pages(row, GONE, pages.size)
            return
        pages = unique(pages)
        private = int(np.count_nonzero(arena.map.slots(pages) == PRIVATE))
        tally.count_pages(row, Outcome.NO_MAPPING, private)

    async def _merge_pairs(self, sides: Sequence[Side | None], records: Runs, tally: Tally) -> None:
        at_once = asyncio.Semaphore(_PAIRS_AT_ONCE)

        async def limited(work: Coroutine[object, object, None]) -> None:
            async with at_once:
                await work

        async with asyncio.TaskGroup() as group:
            for runs in _by_pair(records):
                group.create_task(limited(self._merge_pair(sides, runs, tally)))

    async def _merge_pair(self, sides: Sequence[Side | None], runs: Runs, tally: Tally) -> None:
        rows = {int(runs["leader"][0]), int(runs["follower"][0])} - {ZERO_LEADER}
        gone = [row for row in rows if sides[row] is None]
        if gone:
            pages = int(runs["count"].sum())
            for row in gone:
                tally.count_pages(row, GONE, pages)
            tally.done(pages)
            return
        follower = sides[runs["follower"][0]]
        assert follower is not None
        if runs["leader"][0] == ZERO_LEADER:
            await self._give_back_zeros(follower, runs, tally)
            return
        leader = sides[runs["leader"][0]]
        assert leader is not None
        await PairMerge(self._tools, leader, follower, tally).merge(
            runs["leader_page"].astype(np.int64),
            runs["follower_page"].astype(np.int64),
            runs["count"].astype(np.int64),
        )

    async def _give_back_zeros(self, side: Side, runs: Runs, tally: Tally) -> None:
        first = runs["follower_page"].astype(np.int64)
        counts = runs["count"].astype(np.int64)
        for run, offset, length in batches(counts, wire.REPLACE_PAGES_MAX):
            pages = unique(expand(first[run] + offset, length))
            pages = pages[side.arena.map.slots(pages) == PRIVATE]
            slots = np.full(pages.size, wire.ZERO_SLOT, np.int64)
            tally.count(side.row, await self._tools.orders.replace(side.arena, pages, slots))
            tally.done(int(length.sum()))
            await asyncio.sleep(0)


def _checked(data: bytes, sides: Sequence[Side | None]) -> Runs:
    if len(data) % RUN.itemsize:
        raise InvalidArgumentError(
            f"runs has {len(data)} bytes, which is no whole number of {RUN.itemsize}-byte records"
        )
    runs = np.frombuffer(data, RUN)
    leader, follower = runs["leader"], runs["follower"]
    zero = leader == ZERO_LEADER
    if bool((follower >= len(sides)).any()) or bool((leader[~zero] >= len(sides)).any()):
        raise InvalidArgumentError(f"a run names an arena that is not among the {len(sides)} given")
    for row, side in enumerate(sides):
        pages = _ANY_ARENA_PAGES if side is None else side.arena.pages
        for column, first, some in (
            (leader, runs["leader_page"], ~zero),
            (follower, runs["follower_page"], np.True_),
        ):
            mine = (column == row) & some
            if not within(first[mine], runs["count"][mine], pages):
                raise InvalidArgumentError(
                    f"a run is empty or outside arena {row} of {pages} pages"
                )
    return runs


def _by_pair(runs: Runs) -> Iterator[Runs]:
    """Return the runs of each leader and follower, ascending by the leader's page."""
    runs = runs[np.lexsort((runs["leader_page"], runs["follower"], runs["leader"]))]
    pairs = runs["leader"].astype(np.uint64) << np.uint64(32) | runs["follower"]
    if runs.size:
        yield from np.split(runs, np.flatnonzero(pairs[1:] != pairs[:-1]) + 1)
