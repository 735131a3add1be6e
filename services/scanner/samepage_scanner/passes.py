"""Passes: look at arenas, match what is equal, have it merged, tell what came of it.

Passes run one after the other. Whoever asks for a share waits for the next pass: it serves all
requests that wait when it begins, and looks at every arena of their domains anew, so that it sees
whatever was written before it was asked for. A background pass gives way to requests between two
orders and between two merges.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import structlog
from prometheus_client import Histogram

from samepage.daemon import heap
from samepage.daemon.policies import Policies
from samepage.reports import ShareReport
from samepage_scanner.books import Arena, Books, Domain
from samepage_scanner.budget import Budget
from samepage_scanner.cold import Evictions
from samepage_scanner.config import Config
from samepage_scanner.looking import Looker
from samepage_scanner.merges import Merges
from samepage_scanner.merging import MergerAwayError, MergerClient

_KINDS = ("background", "share")
_PASS_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)

log = structlog.get_logger(__name__)


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


class Passes:
    """Runs passes.

    Args:
        passed: called after every pass.

    Attributes:
        interval: seconds from the beginning of a background pass to the next.
        budget: what background passes may spend.
        looker: what looks at pages.
        merges: what has equal pages merged.
        evictions: what has cold pages leave.
        passes: how many there were.
        seconds: how long they took.
        shares: requests so far.
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
        self._waiting: list[_Request] = []
        self._urgent = asyncio.Event()
        self._woken = asyncio.Event()
        self.budget = Budget(policies, self._urgent)
        self.looker = Looker(books, policies, self.budget)
        self.merges = Merges(policies, merger, self.budget, self._urgent.is_set)
        self.evictions = Evictions(policies, merger, self.budget, self._urgent.is_set)
        self._running = asyncio.Lock()
        self.interval = policies.current.interval_seconds
        self.passes = 0
        self.shares = 0
        self.seconds = Histogram(
            "samepage_scanner_pass_seconds",
            "How long passes took, by kind: background, or share.",
            ["kind"],
            buckets=_PASS_SECONDS,
            registry=None,
        )
        for kind in _KINDS:
            self.seconds.labels(kind)

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
        self.shares += 1
        self._waiting.append(request)
        self._urgent.set()
        self._woken.set()
        try:
            return await answer
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
            if not self._waiting:
                self._urgent.clear()

    async def look(self) -> None:
        """Look at every arena now, and have nothing merged."""
        async with self._running:
            self.budget.charge_own()
            await self._bury()
            await self.looker.look(list(self._books.arenas()), lambda: False, urgent=True)
            self.budget.forgive_own()

    def hasten(self) -> None:
        """Something is new: have the next background pass after the short pause."""
        self.interval = self._policies.current.interval_seconds
        self._woken.set()

    async def run_forever(self) -> None:
        """Passes, each when its time has come or as soon as a share waits, until cancelled."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while True:
            await self._sleep(began + self.interval - clock())
            if not self._waiting:
                if clock() - began < self.interval:
                    continue
                began = clock()
            await self.run_once()

    async def run_once(self) -> None:
        """One pass: over the domains of the shares that wait, or else over all."""
        async with self._running:
            shares, self._waiting = self._waiting, []
            self._urgent.clear()
            try:
                with self.seconds.labels(_KINDS[bool(shares)]).time():
                    if shares:
                        await self._serve(shares)
                    else:
                        await self._background()
            finally:
                for share in shares:
                    text = "the scanner is stopping; try again when it is back"
                    _fail(share, errno.ENOTCONN, text)
                self.passes += 1
                heap.trim()
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

    async def _background(self) -> None:
        domains = list(self._books.domains.values())
        arenas = [arena for domain in domains for arena in domain.arenas]
        await self._bury()
        look = await self.looker.look(arenas, self._urgent.is_set)
        merged = 0
        for domain in domains:
            if domain.dirty and not self._waiting:
                merged += await self._merge_in_background(domain)
        for domain in domains:
            if not self._waiting:
                await self.evictions.evict(domain)
        if look.written or merged:
            self.interval = self._policies.current.interval_seconds
        else:
            longest = self._policies.current.interval_max_seconds
            self.interval = min(2 * self.interval, longest)
        self.budget.charge_own()

    async def _merge_in_background(self, domain: Domain) -> int:
        await self.budget.admit()
        try:
            return (await self.merges.merge(domain)).merged
        except MergerAwayError as error:
            log.debug("not merging now", domain=domain.name, why=str(error))
            return 0

    async def _serve(self, shares: Sequence[_Request]) -> None:
        by_domain: dict[Domain, list[_Request]] = {}
        for share in shares:
            by_domain.setdefault(share.domain, []).append(share)
        arenas = [arena for domain in by_domain for arena in domain.arenas]
        self.budget.charge_own()
        await self._bury()
        look = await self.looker.look(arenas, lambda: False, urgent=True)
        for domain, its_shares in by_domain.items():
            for share in its_shares:
                _narrow(share, look.seen)
            ready = [share for share in its_shares if not share.answer.done()]
            if ready:
                await self._answer(domain, ready)
        self.budget.forgive_own()

    async def _answer(self, domain: Domain, shares: Sequence[_Request]) -> None:
        try:
            await self._merger.ready()
            done = await self.merges.merge(domain, urgent=True)
        except MergerAwayError as error:
            for share in shares:
                _fail(share, errno.ENOTCONN, str(error))
        else:
            self.interval = self._policies.current.interval_seconds
            for share in shares:
                _narrow(share, set(done.arenas))
                if not share.answer.done():
                    share.answer.set_result([done.report(arena) for arena in share.arenas])

    async def _bury(self) -> None:
        async with self._books.lock:
            self._books.bury()


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
