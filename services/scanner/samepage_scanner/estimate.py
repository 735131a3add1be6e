"""What sharing would save in a domain, by what the books say now; changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import PageState
from samepage_scanner.books import Arena
from samepage_scanner.match import Match, Runs, match
from samepage_scanner.pages import STATE, Pages

STRETCHES_MAX = 4096

#: Pages in each stretch of an arena.
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stretches:
    """What an arena's pages are, by stretches of about the same length."""

    pages: Counts
    absent: Counts
    shared: Counts
    zero: Counts
    duplicate: Counts


@dataclass(frozen=True, slots=True)
class ArenaEstimate:
    """Pages of an arena, by what a share would make of them; they sum to `pages`, but for `runs`,
    which is how many runs of neighbours the duplicates are in, and for `same_process`, which is how
    many of them are equal to pages of their own process alone."""

    arena: Arena
    pages: int
    absent: int
    shared: int
    zero: int
    duplicate: int
    same_process: int
    kept: int
    runs: int
    stretches: Stretches | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What matching found.

    Attributes:
        lengths: pages that would be saved by run, by the power of two not above its length.
    """

    arenas: list[ArenaEstimate]
    lengths: dict[int, int]


async def estimate(arenas: Sequence[Arena], stretches: int = 0) -> Estimate:
    """Match the arenas of one domain, in a thread; of each, tell of so many stretches."""
    return await asyncio.to_thread(_estimate, list(arenas), stretches)


def _estimate(arenas: list[Arena], stretches: int) -> Estimate:
    numbers = {agent: number for number, agent in enumerate({arena.agent for arena in arenas})}
    processes = [numbers[arena.agent] for arena in arenas]
    found = match([arena.pages for arena in arenas], waive=True, processes=processes)
    estimates = [_of(arena, row, found, stretches) for row, arena in enumerate(arenas)]
    return Estimate(estimates, _lengths(found))


def _of(arena: Arena, row: int, found: Match, stretches: int) -> ArenaEstimate:
    equal = found.equal["count"][found.equal["follower_arena"] == row]
    zero = int(found.zero["count"][found.zero["follower_arena"] == row].sum())
    duplicate = int(equal.sum())
    absent, shared = (arena.pages.count(s) for s in (PageState.ABSENT, PageState.SHARED))
    pages = len(arena.pages)
    # the page that others follow is kept, as are those without an equal one
    kept = max(pages - absent - shared - zero - duplicate, 0)
    where = _stretches(arena.pages, row, found, stretches) if stretches else None
    return ArenaEstimate(
        arena=arena,
        pages=pages,
        absent=absent,
        shared=shared,
        zero=zero,
        duplicate=duplicate,
        same_process=int(found.same_process[row]),
        kept=kept,
        runs=equal.size,
        stretches=where,
    )


def _stretches(pages: Pages, row: int, found: Match, count: int) -> Stretches:
    count = min(count, STRETCHES_MAX, len(pages))
    edges = np.arange(count + 1) * len(pages) // count
    states = np.array(
        [
            np.bincount(pages.flags[low:high] & STATE, minlength=len(PageState))
            for low, high in pairwise(edges.tolist())
        ]
    )
    return Stretches(
        pages=np.diff(edges),
        absent=states[:, PageState.ABSENT],
        shared=states[:, PageState.SHARED],
        zero=_inside(found.zero, row, edges),
        duplicate=_inside(found.equal, row, edges),
    )


def _inside(runs: Runs, row: int, edges: Counts) -> Counts:
    """How many of the arena's pages are in runs, between each two edges."""
    mine = np.sort(runs[runs["follower_arena"] == row], order="follower_page")
    first, counts = mine["follower_page"].astype(np.int64), mine["count"].astype(np.int64)
    if not first.size:
        return np.zeros(edges.size - 1, np.int64)
    before = np.concatenate(([0], np.cumsum(counts)))
    # of the last run that begins before an edge, only a part may lie before it
    last = np.searchsorted(first, edges, "left") - 1
    inside = np.minimum(edges - first[last], counts[last])
    return np.diff(np.where(last < 0, 0, before[last] + inside))


def _lengths(found: Match) -> dict[int, int]:
    lengths = found.equal["count"].astype(np.int64)
    if not lengths.size:
        return {}
    pages = np.bincount(np.log2(lengths).astype(np.int64), weights=lengths)
    return {1 << power: int(count) for power, count in enumerate(pages.tolist()) if count}
