"""What sharing would save in a domain, by what the books say now; changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samepage.daemon.wire import PageState
from samepage_scanner.books import Arena
from samepage_scanner.match import Match, match


@dataclass(frozen=True, slots=True)
class ArenaEstimate:
    """Pages of an arena, by what a share would make of them; they sum to `pages`, but for `runs`,
    which is how many stretches of neighbours the duplicates are in."""

    arena: Arena
    pages: int
    absent: int
    shared: int
    zero: int
    duplicate: int
    kept: int
    runs: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What matching found.

    Attributes:
        lengths: pages that would be saved by run, by the power of two not above its length.
    """

    arenas: list[ArenaEstimate]
    lengths: dict[int, int]


async def estimate(arenas: Sequence[Arena]) -> Estimate:
    """Match the arenas of one domain, in a thread."""
    arenas = list(arenas)
    found = await asyncio.to_thread(match, [arena.pages for arena in arenas], waive=True)
    return Estimate([_of(arena, row, found) for row, arena in enumerate(arenas)], _lengths(found))


def _of(arena: Arena, row: int, found: Match) -> ArenaEstimate:
    equal = found.equal["count"][found.equal["follower_arena"] == row]
    zero = int(found.zero["count"][found.zero["follower_arena"] == row].sum())
    duplicate = int(equal.sum())
    absent, shared = (arena.pages.count(s) for s in (PageState.ABSENT, PageState.SHARED))
    pages = len(arena.pages)
    # the page that others follow is kept, as are those without an equal one
    kept = max(pages - absent - shared - zero - duplicate, 0)
    return ArenaEstimate(arena, pages, absent, shared, zero, duplicate, kept, equal.size)


def _lengths(found: Match) -> dict[int, int]:
    lengths = found.equal["count"].astype(np.int64)
    if not lengths.size:
        return {}
    pages = np.bincount(np.log2(lengths).astype(np.int64), weights=lengths)
    return {1 << power: int(count) for power, count in enumerate(pages.tolist()) if count}
