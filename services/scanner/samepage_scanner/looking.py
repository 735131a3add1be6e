"""Looks at arenas: asks agents what was written, and what that looks like now.

Where an agent tracks writes, a pass fingerprints what it names and what is stale (attention.py),
else all that is due. How one agent is asked is in turns.py.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from samepage.daemon import wire
from samepage.daemon.peers import OrderRefusedError, PeerGoneError
from samepage.daemon.policies import Policies
from samepage_scanner import fingerprints as fp
from samepage_scanner.attention import BLOCK_PAGES
from samepage_scanner.books import Agent, Arena, Books
from samepage_scanner.budget import Budget, NoBudget
from samepage_scanner.config import Config
from samepage_scanner.turns import LATE_SECONDS, RANGES_MAX, Ranges, Turn

_AGENTS_AT_ONCE = 2

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Look:
    """What came of looking at some arenas.

    Attributes:
        seen: the arenas that were looked at from end to end.
        written: pages with another fingerprint than before.
    """

    seen: set[Arena] = field(default_factory=set)
    written: int = 0


class Looker:
    """Looks at arenas.

    Attributes:
        checked_at: when the last share of all pages was made stale, by the event loop's clock.
    """

    def __init__(self, books: Books, policies: Policies[Config], budget: Budget) -> None:
        self._books = books
        self._policies = policies
        self._budget = budget
        self.checked_at = asyncio.get_running_loop().time()

    async def look(
        self, arenas: Sequence[Arena], interrupted: Callable[[], bool], urgent: bool = False
    ) -> Look:
        """Look at these arenas, or until `interrupted` says to leave off.

        Args:
            urgent: look at blocks that rest too, and whatever the budget says.
        """
        result = Look()
        by_agent: dict[Agent, list[Arena]] = {}
        for arena in arenas:
            by_agent.setdefault(arena.agent, []).append(arena)
        places = asyncio.Semaphore(_AGENTS_AT_ONCE)
        budget = NoBudget() if urgent else self._budget
        if not urgent:
            self._check(arenas)
        turns = {}
        for agent, its_arenas in by_agent.items():
            pages = sum(len(arena.pages) for arena in its_arenas)
            turn = Turn(agent, pages, self._policies.current.answer_seconds, places, budget)
            work = _Work(self._books, turn, interrupted, result)
            rest_max = None if urgent else self._policies.current.rest_passes_max
            turns[asyncio.create_task(work.run(its_arenas, rest_max))] = turn
        await _finish(turns, result)
        return result

    def _check(self, arenas: Sequence[Arena]) -> None:
        """Have the next share of every arena looked at whatever its agent says."""
        now = asyncio.get_running_loop().time()
        share = (now - self.checked_at) / self._policies.current.recheck_seconds
        self.checked_at = now
        for arena in arenas:
            if arena.tracked:
                arena.attention.check(share)


class _Work:
    """What one agent has to do in a pass."""

    def __init__(
        self, books: Books, turn: Turn, interrupted: Callable[[], bool], result: Look
    ) -> None:
        self._books = books
        self._turn = turn
        self._interrupted = interrupted
        self._result = result

    async def run(self, arenas: Sequence[Arena], rest_max: int | None) -> None:
        """Look at the agent's arenas, until it fails.

        Args:
            rest_max: see Attention.looked; None: nothing rests, and nothing is noted of it.
        """
        async with self._turn:
            for arena in arenas:
                try:
                    await self._arena(arena, rest_max)
                except (TimeoutError, PeerGoneError):
                    return
                except OrderRefusedError as error:
                    pid = self._turn.agent.peer.pid
                    log.debug("agent refuses an order", pid=pid, errno=error.args[0])

    async def _arena(self, arena: Arena, rest_max: int | None) -> None:
        blocks = arena.attention
        due = blocks.begin(arena.tracked, everything=rest_max is None)
        for first, end in blocks.stretches(due):
            changed = await self._stretch(arena, first, end)
            if changed is None:
                return
            arena.coldness.looked(first, changed)
            if rest_max is not None:
                blocks.looked(first, end, changed, rest_max)
        arena.passes += 1
        self._result.seen.add(arena)

    async def _stretch(self, arena: Arena, first: int, end: int) -> fp.Mask | None:
        """Look at some blocks; which of them changed, or None when that was broken off."""
        if self._interrupted() or arena.closed:
            return None
        blocks = arena.attention
        page, count = blocks.span(first, end)
        changed = np.zeros(end - first, np.bool_)
        named = np.zeros(count, np.bool_)
        if arena.tracked:
            named = _mask(await self._named(arena, first, end), page, count)
            changed[np.flatnonzero(named) // BLOCK_PAGES] = True
        wanted = named | np.repeat(blocks.stale[first:end], BLOCK_PAGES)[:count]
        if arena.tracked:
            await self._settle(arena, first, end, wanted)
            # Until they were looked at.
            blocks.stale[first:end] |= changed
        for pages, ranges in _orders(np.flatnonzero(wanted) + page, arena.tracked):
            if self._interrupted():
                return None
            differs = await self._fingerprint(arena, pages, ranges)
            if not arena.tracked:
                changed[(pages[differs] - page) // BLOCK_PAGES] = True
        blocks.stale[first:end] = False
        return changed

    async def _named(self, arena: Arena, first: int, end: int) -> Ranges:
        """The pages of some blocks that were written since this was asked last."""
        told = False
        try:
            ranges = await self._turn.changed(arena, *arena.attention.span(first, end))
            told = True
        except OrderRefusedError as error:
            if error.args[0] != errno.ENOTSUP:
                raise
            arena.names_writes = False
            return np.empty((0, 2), np.int64)
        finally:
            if not told:
                # It may have told of writes, or take them as told.
                arena.attention.stale[first:end] = True
        return ranges

    async def _settle(self, arena: Arena, first: int, end: int, wanted: fp.Mask) -> None:
        """Pages that were looked at, and not written since, are stable now."""
        blocks = arena.attention
        unsettled = blocks.unsettled[first:end]
        if not unsettled.any():
            return
        page, count = blocks.span(first, end)
        still = np.repeat(unsettled, BLOCK_PAGES)[:count] & ~wanted
        async with self._books.lock:
            if not arena.closed:
                self._books.settle(arena, np.flatnonzero(still) + page)
        unsettled[:] = False

    async def _fingerprint(self, arena: Arena, pages: fp.Indices, ranges: Ranges) -> fp.Mask:
        """Note what pages look like; which of them look different than before."""
        fresh, states = await self._turn.fingerprint(arena, ranges)
        async with self._books.lock:
            if arena.closed:
                raise PeerGoneError
            differs = self._books.update(arena, pages, fresh, states)
        self._result.written += int(np.count_nonzero(differs))
        return differs


async def _finish(turns: Mapping[asyncio.Task[None], Turn], result: Look) -> None:
    """Wait for all turns; but once others are done, not for agents that are late."""
    pending = set(turns)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=LATE_SECONDS / 4, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            late = {turns[task].agent for task in pending if turns[task].late}
            others = any(arena.agent not in late for arena in result.seen)
            if pending and len(late) == len(pending) and others:
                for agent in late:
                    names = sorted(arena.name for arena in agent.arenas.values())
                    log.warning("agent is left out", pid=agent.peer.pid, arenas=names)
                return
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _mask(ranges: Ranges, page: int, count: int) -> fp.Mask:
    """By page of `count` from `page` on, whether it is in one of the ranges."""
    steps = np.zeros(count + 1, np.int8)
    steps[ranges[:, 0] - page] += 1
    steps[ranges.sum(axis=1) - page] -= 1
    mask: fp.Mask = np.cumsum(steps[:-1], dtype=np.int8) > 0
    return mask


def _orders(pages: fp.Indices, many: bool) -> Iterator[tuple[fp.Indices, Ranges]]:
    """Split pages, ascending, into what one order asks for: the pages, and the same as ranges.

    Args:
        many: an order may have several ranges.
    """
    ranges_max = RANGES_MAX if many else 1
    while len(pages):
        part = pages[: wire.FINGERPRINT_PAGES_MAX]
        starts = np.concatenate(([0], np.flatnonzero(np.diff(part) != 1) + 1))
        if len(starts) > ranges_max:
            part, starts = part[: starts[ranges_max]], starts[:ranges_max]
        yield part, np.stack((part[starts], np.diff(starts, append=len(part))), axis=1)
        pages = pages[len(part) :]
