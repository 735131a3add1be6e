"""Passes: look at arenas, match what is equal, have it merged, tell what came of it.

Passes run one after the other. Whoever asks for a share waits for the next pass: it serves all
requests that wait when it begins, and looks at every arena of their domains anew, so that it sees
whatever was written before it was asked for. A background pass gives way to requests between two
orders and between two merges.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

from samepage.daemon.policies import Policies
from samepage.daemon.wire import Outcome, PageState
from samepage.reports import ShareReport
from samepage_scanner.books import Arena, Books, Domain
from samepage_scanner.config import Config
from samepage_scanner.looking import Look, Looker
from samepage_scanner.match import Match, Runs, match
from samepage_scanner.merging import (
    GONE,
    MergerAwayError,
    MergerClient,
    MergerRefusedError,
    Tally,
    new_tally,
    requests,
    split_by_arenas,
)

log = structlog.get_logger(__name__)

# Outcomes that a later try may better though no page changes meanwhile.
_PASSING = (Outcome.PINNED, Outcome.BUSY, GONE)


class ShareRefusedError(Exception):
    """A share cannot be done.

    Attributes:
        error: an errno.
        text: says what to do.
    """

    def __init__(self, error: int, text: str) -> None:
        super().__init__(error, text)
        self.error = error
        self.text = text


@dataclass(eq=False, slots=True)
class _Request:
    domain: Domain
    arenas: Sequence[Arena]
    answer: asyncio.Future[list[ShareReport]]


@dataclass(frozen=True, slots=True)
class _Merged:
    """A domain's tallies by arena, of runs of zeros and of others."""

    arenas: Sequence[Arena]
    found: Match
    zero: Tally
    equal: Tally

    def report(self, arena: Arena) -> ShareReport:
        number = self.arenas.index(arena)
        both = self.zero[number] + self.equal[number]
        shared = arena.pages.count(PageState.SHARED) + self.equal[number, Outcome.MERGED]
        return ShareReport(
            merged=int(both[Outcome.MERGED]),
            differs=int(both[Outcome.DIFFERS]),
            pinned=int(both[Outcome.PINNED]),
            absent=arena.pages.count(PageState.ABSENT) + int(both[Outcome.ABSENT]),
            # The merger will know the arena in a moment: its agent is announcing it anew.
            busy=int(both[Outcome.BUSY] + both[GONE]),
            no_mapping=int(both[Outcome.NO_MAPPING]),
            unsupported=int(both[Outcome.UNSUPPORTED]),
            unique=int(self.found.unique[number]),
            shared=int(shared),
            pages=len(arena.pages),
        )


class Passes:
    """Runs passes.

    Args:
        passed: called after every pass.

    Attributes:
        interval: the pause before the next background pass, in seconds.
        passes: how many there were.
    """

    def __init__(
        self,
        policies: Policies[Config],
        books: Books,
        merger: MergerClient,
        passed: Callable[[], None],
    ) -> None:
        self._policies = policies
        self._books = books
        self._merger = merger
        self._passed = passed
        self._looker = Looker(books, policies.current.answer_seconds)
        self._waiting: list[_Request] = []
        self._woken = asyncio.Event()
        self._running = asyncio.Lock()
        self.interval = policies.current.interval_seconds
        self.passes = 0

    async def share(self, domain: Domain, arenas: Sequence[Arena]) -> list[ShareReport]:
        """Look now and merge what is equal.

        Args:
            arenas: at least one, all of the domain.

        Returns:
            A report on each of these arenas, without those that went or could not be looked at.

        Raises:
            ShareRefusedError: the merger is away, or there is nothing to report on.
        """
        answer: asyncio.Future[list[ShareReport]] = asyncio.get_running_loop().create_future()
        request = _Request(domain, arenas, answer)
        self._waiting.append(request)
        self._woken.set()
        try:
            return await answer
        finally:
            if request in self._waiting:
                self._waiting.remove(request)

    def hasten(self) -> None:
        """Something is new: have the next background pass after the short pause."""
        self.interval = self._policies.current.interval_seconds
        self._woken.set()

    async def run_forever(self) -> None:
        """Passes, each after its pause or as soon as a share waits, until cancelled."""
        clock = asyncio.get_running_loop().time
        ended, pause = clock(), 0.0
        while True:
            await self._sleep(ended + max(pause, self.interval) - clock())
            if self._waiting:
                await self.run_once()
            elif clock() - ended >= max(pause, self.interval):
                pause = await self.run_once()
                ended = clock()

    async def run_once(self) -> float:
        """One pass: over the domains of the shares that wait, or else over all.

        Returns:
            For how many seconds the next background pass should keep away, at the least.
        """
        async with self._running:
            shares, self._waiting = self._waiting, []
            try:
                if shares:
                    await self._serve(shares)
                    return 0.0
                return await self._background()
            finally:
                for share in shares:
                    text = "the scanner is stopping; try again when it is back"
                    _fail(share, errno.ENOTCONN, text)
                self.passes += 1
                self._passed()

    async def _sleep(self, seconds: float) -> None:
        self._woken.clear()
        if self._waiting:
            return
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _background(self) -> float:
        cpu = time.process_time()
        domains = list(self._books.domains.values())
        arenas = [arena for domain in domains for arena in domain.arenas]
        look = await self._look(arenas)
        merged = 0
        for domain in domains:
            if domain.dirty and not self._waiting:
                merged += await self._merge_in_background(domain)
        if look.written or merged:
            self.interval = self._policies.current.interval_seconds
        else:
            self.interval = min(2 * self.interval, self._policies.current.interval_max_seconds)
        busy = look.agent_seconds + time.process_time() - cpu
        return busy * (100 / self._policies.current.cpu_percent - 1)

    async def _merge_in_background(self, domain: Domain) -> int:
        try:
            done = await self._merge(domain, waive=False)
        except MergerAwayError as error:
            log.debug("not merging now", domain=domain.name, why=str(error))
            return 0
        return int((done.zero + done.equal)[:, Outcome.MERGED].sum())

    async def _serve(self, shares: Sequence[_Request]) -> None:
        by_domain: dict[Domain, list[_Request]] = {}
        for share in shares:
            by_domain.setdefault(share.domain, []).append(share)
        arenas = [arena for domain in by_domain for arena in domain.arenas]
        look = await self._look(arenas, urgent=True)
        for domain, its_shares in by_domain.items():
            for share in its_shares:
                _narrow(share, look.seen)
            ready = [share for share in its_shares if not share.answer.done()]
            if ready:
                await self._answer(domain, ready)

    async def _answer(self, domain: Domain, shares: Sequence[_Request]) -> None:
        try:
            await self._merger.ready()
            done = await self._merge(domain, waive=True)
        except MergerAwayError as error:
            for share in shares:
                _fail(share, errno.ENOTCONN, str(error))
        else:
            self.interval = self._policies.current.interval_seconds
            for share in shares:
                _narrow(share, set(done.arenas))
                if not share.answer.done():
                    share.answer.set_result([done.report(arena) for arena in share.arenas])

    async def _look(self, arenas: Sequence[Arena], urgent: bool = False) -> Look:
        async with self._books.lock:
            self._books.bury()
        return await self._looker.look(arenas, lambda: not urgent and bool(self._waiting))

    async def _merge(self, domain: Domain, waive: bool) -> _Merged:
        """Match a domain's pages and have them merged.

        Raises:
            MergerAwayError: the domain stays dirty.
        """
        arenas = list(domain.arenas)
        domain.dirty = False
        complete = False
        try:
            found = await asyncio.to_thread(match, [a.pages for a in arenas], waive=waive)
            done = _Merged(arenas, found, new_tally(len(arenas)), new_tally(len(arenas)))
            complete = await self._order_merges(domain, done, waive)
        finally:
            domain.dirty = domain.dirty or not complete
        return done

    async def _order_merges(self, domain: Domain, done: _Merged, waive: bool) -> bool:
        """Whether all was done, and nothing is left that a later try could better."""
        for runs, tally in ((done.found.zero, done.zero), (done.found.equal, done.equal)):
            for request in requests(runs):
                if self._waiting and not waive:
                    return False
                await self._order_merge(domain, done.arenas, request, tally)
        return not (done.zero + done.equal)[:, _PASSING].any()

    async def _order_merge(
        self, domain: Domain, arenas: Sequence[Arena], runs: Runs, tally: Tally
    ) -> None:
        """One request; or, when the merger refuses it, one for each pair of arenas.

        What an agent says of its arenas to both daemons may differ, by malice or for a moment.
        That must cost nobody else anything.
        """
        try:
            await self._merger.merge(domain.name, arenas, runs, tally)
        except MergerRefusedError as error:
            pairs = split_by_arenas(runs)
            if len(pairs) > 1:
                for pair in pairs:
                    await self._order_merge(domain, arenas, pair, tally)
                return
            follower = int(runs["follower_arena"][0])
            log.warning("merger refuses runs", arena=arenas[follower].name, why=str(error))
            tally[follower, GONE] += int(runs["count"].sum())


def _narrow(share: _Request, seen: Collection[Arena]) -> None:
    """Leave arenas out of a share that are closed or were not seen; refuse it if none is left."""
    left = [arena for arena in share.arenas if arena in seen and not arena.closed]
    if left or share.answer.done():
        share.arenas = left
        return
    name = share.arenas[0].name
    if share.arenas[0].closed:
        _fail(share, errno.ENOENT, f"arena {name!r} was closed meanwhile")
    else:
        _fail(
            share,
            errno.ETIMEDOUT,
            f"the process of arena {name!r} does not answer in time; "
            "see that it is not stopped, then try again",
        )


def _fail(share: _Request, error: int, text: str) -> None:
    if not share.answer.done():
        share.answer.set_exception(ShareRefusedError(error, text))
