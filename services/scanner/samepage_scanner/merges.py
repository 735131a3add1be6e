"""Has equal pages of a domain made one: matches them, orders the merges, tells what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from samepage.daemon.policies import Policies
from samepage.daemon.wire import Outcome, PageState
from samepage.reports import ShareReport
from samepage_scanner.books import Arena, Domain
from samepage_scanner.budget import Budget
from samepage_scanner.config import Config
from samepage_scanner.match import NO_LEADER, Match, Runs, match
from samepage_scanner.merging import (
    BACKGROUND_PAGES_MAX,
    DISPLACED,
    GONE,
    NO_HEADROOM,
    REQUEST_PAGES_MAX,
    MergerClient,
    MergerRefusedError,
    Tally,
    new_tally,
    requests,
    split_by_arenas,
)

log = structlog.get_logger(__name__)

# Outcomes that a later try may better though no page changes meanwhile.
_PASSING = (Outcome.PINNED, Outcome.BUSY, GONE, NO_HEADROOM)


@dataclass(frozen=True, slots=True)
class Merged:
    """What became of a domain's pages: tallies by arena, of runs of zeros and of others."""

    arenas: Sequence[Arena]
    found: Match
    zero: Tally
    equal: Tally

    @property
    def merged(self) -> int:
        """Pages that were merged."""
        return int((self.zero + self.equal)[:, Outcome.MERGED].sum())

    def report(self, arena: Arena) -> ShareReport:
        """The same for one of the arenas."""
        number = self.arenas.index(arena)
        both = self.zero[number] + self.equal[number]
        displaced = int(both[DISPLACED])
        shared = arena.pages.count(PageState.SHARED) + self.equal[number, Outcome.MERGED]
        return ShareReport(
            merged=int(both[Outcome.MERGED]),
            differs=int(both[Outcome.DIFFERS]),
            pinned=int(both[Outcome.PINNED]),
            absent=arena.pages.count(PageState.ABSENT) + int(both[Outcome.ABSENT]),
            # The merger will know the arena in a moment: its agent is announcing it anew.
            busy=int(both[Outcome.BUSY] + both[GONE]),
            no_mapping=int(both[Outcome.NO_MAPPING]) + displaced,
            unsupported=int(both[Outcome.UNSUPPORTED]),
            unique=int(self.found.unique[number]),
            shared=int(shared) - displaced,
            pages=len(arena.pages),
            no_headroom=int(both[NO_HEADROOM]),
        )


class Merges:
    """Merges one domain after the other.

    Args:
        interrupted: says that background work should leave off.
        budget: whose pace background work keeps.

    Attributes:
        candidates: pages that matching found equal to others, or zero, so far.
    """

    def __init__(
        self,
        policies: Policies[Config],
        merger: MergerClient,
        budget: Budget,
        interrupted: Callable[[], bool],
    ) -> None:
        self._policies = policies
        self._merger = merger
        self._budget = budget
        self._interrupted = interrupted
        self.candidates = 0

    async def merge(self, domain: Domain, urgent: bool = False) -> Merged:
        """Match a domain's pages and have them merged, the longest runs first.

        Args:
            urgent: pages that are not stable too, whoever waits and whatever the budget says.

        Raises:
            MergerAwayError: the domain stays dirty.
        """
        arenas = list(domain.arenas)
        min_run = self._policies.current.min_run_pages
        if urgent and not domain.dirty and domain.quiet:
            asked, found = domain.quiet
            # an arena may have come that has no page yet
            if asked == min_run and len(found.unique) == len(arenas):
                return _nothing_done(arenas, found)
        domain.dirty, domain.quiet = False, None
        complete = False
        try:
            pages = [arena.pages for arena in arenas]
            # A process that does not answer the scanner would not answer the merger.
            mute = [number for number, arena in enumerate(arenas) if arena.agent.silent]
            found = await asyncio.to_thread(match, pages, waive=urgent, min_run=min_run, mute=mute)
            self.candidates += sum(int(runs["count"].sum()) for runs in (found.equal, found.zero))
            done = _nothing_done(arenas, found)
            complete = await self._order_all(domain, done, urgent) and not mute
            if urgent and complete and not len(found.equal) and not len(found.zero):
                domain.quiet = min_run, found
        finally:
            domain.dirty = domain.dirty or not complete
        return done

    async def _order_all(self, domain: Domain, done: Merged, urgent: bool) -> bool:
        """Whether all was done, and nothing is left that a later try could better."""
        pages_max = REQUEST_PAGES_MAX if urgent else BACKGROUND_PAGES_MAX
        for runs, tally in ((done.found.zero, done.zero), (done.found.equal, done.equal)):
            for request in requests(runs, pages_max):
                if not urgent:
                    await self._budget.admit()
                    if self._interrupted():
                        return False
                await self._order(domain, done.arenas, request, tally, urgent)
        return not (done.zero + done.equal)[:, _PASSING].any()

    async def _order(
        self, domain: Domain, arenas: Sequence[Arena], runs: Runs, tally: Tally, urgent: bool
    ) -> None:
        """One request; or, when the merger refuses it, one for each pair of arenas.

        What an agent says of its arenas to both daemons may differ, by malice or for a moment.
        That must cost nobody else anything.
        """
        _mark(arenas, runs)
        try:
            if urgent:
                await self._merger.merge(domain.name, arenas, runs, tally)
            else:
                await self._charged(domain, arenas, runs, tally)
        except MergerRefusedError as error:
            pairs = split_by_arenas(runs)
            if len(pairs) > 1:
                for pair in pairs:
                    await self._order(domain, arenas, pair, tally, urgent)
                return
            follower = int(runs["follower_arena"][0])
            log.warning("merger refuses runs", arena=arenas[follower].name, why=str(error))
            tally[follower, GONE] += int(runs["count"].sum())

    async def _charged(
        self, domain: Domain, arenas: Sequence[Arena], runs: Runs, tally: Tally
    ) -> None:
        """One request at the budget's expense."""
        agents = {arenas[number].agent for number in _involved(runs)}
        async with self._merger.charged(self._budget, agents):
            await self._merger.merge(domain.name, arenas, runs, tally)


def _nothing_done(arenas: Sequence[Arena], found: Match) -> Merged:
    return Merged(arenas, found, new_tally(len(arenas)), new_tally(len(arenas)))


def _involved(runs: Runs) -> list[int]:
    numbers = np.union1d(runs["leader_arena"], runs["follower_arena"])
    return [int(number) for number in numbers if number != NO_LEADER]


def _mark(arenas: Sequence[Arena], runs: Runs) -> None:
    """Have the pages looked at in the next pass: merging is no write that an agent tells of."""
    for side in ("leader", "follower"):
        for number in _involved(runs):
            if arenas[number].tracked:
                mine = runs[runs[f"{side}_arena"] == number]
                first, count = mine[f"{side}_page"], mine["count"]
                arenas[number].attention.mark(first.astype(np.int64), count.astype(np.int64))
