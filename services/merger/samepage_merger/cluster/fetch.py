"""Fetches pages from other hosts by their digests, from several holders at a time.

Theory. Pages are asked for in works of 1024, eight at a time, so that what is in flight is 32 MiB
at most. Each holder has two works, so that one is hashed while the other is on its way, and takes
the next when one is done: a slow holder simply gets fewer. When nothing is left that nobody was
asked for, what a slow one still owes is asked of another as well, and the first answer counts. A
holder that does not answer is left alone for a while, one whose pages do not have their digest for
longer; what it was asked goes to others.

Whom to ask: those whom the caller names, and those whom the index names for the fingerprints. Where
the index knows only a sample, a hit stands for the pages around it, since what is equal comes in
runs. What none of these has is asked of every live host. Nobody is ever believed: a page counts
when its bytes have the digest.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog

from samepage.daemon.wire import PAGE_SIZE
from samepage.v1 import pages_pb2
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.digests import Fingerprints, are_zero, equal
from samepage_merger.cluster.hosts import Host, HostAwayError, Hosts
from samepage_merger.domains import Domain
from samepage_merger.runs import Indices

WORK_PAGES = 1024
WORKS_AT_ONCE = 8
WORKS_A_HOLDER = 2
#: Pages that one round deals with: what one lookup of the index takes.
ROUND_PAGES = 1 << 16

_WORK_SECONDS = 10.0
_PAGE_SECONDS = 1.0
_PATIENCE_SECONDS = 0.05
_PATIENCE_WORKS = 4
_NEIGHBOURHOOD = 2

#: Gets pages that have their digests: which of those asked for, ascending, and their bytes. Nothing
#: more is asked of the holder that sent them until it returns.
Take = Callable[[Indices, Bytes], Coroutine[object, object, None]]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Missing:
    """Pages that nobody sent.

    Attributes:
        numbers: which of those asked for, ascending.
        gone: of these, whether every live host said that it has not got the page. Of the others
            nobody knows: somebody who may have them did not answer, or the index did not.
    """

    numbers: Indices
    gone: Mask


@dataclass
class FetchCounts:
    """What happened since start, in pages; `slow` counts works asked of a second holder."""

    fetched: int = 0
    wrong: int = 0
    slow: int = 0


class Fetcher:
    """Fetches pages.

    Attributes:
        counts: since start.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.counts = FetchCounts()

    async def page(self, domain: Domain, digest: bytes, hints: Iterable[str]) -> bytes | None:
        """Return one page that somebody waits for, or None when none of the hints sends it now.

        The shortest way there is; `fetch` is the thorough one.
        """
        request = pages_pb2.FetchRequest(domain_id=domain.id, digests=digest)
        for host in self._hosts.known(hints):
            if host.avoided:
                continue
            try:
                response = await host.fetch(request, _PAGE_SECONDS)
            except HostAwayError:
                continue
            page = bytes(response.pages)
            if not page:
                continue
            if domain.digester.page(page) == digest:
                self.counts.fetched += 1
                return page
            self.lied(host, 1)
        return None

    async def fetch(
        self,
        domain: Domain,
        digests: Digests,
        fingerprints: Fingerprints,
        hints: Sequence[str],
        take: Take,
    ) -> Missing:
        """Fetch pages; each goes to `take` once, as it comes. Digests of zeros are passed over.

        What `take` raises ends it all.

        Args:
            fingerprints: as many as digests, or none when they are not known.
            hints: names of hosts that should have any of them.
        """
        missing: list[Missing] = []
        for low in range(0, len(digests), ROUND_PAGES):
            part = slice(low, low + ROUND_PAGES)

            async def take_part(numbers: Indices, data: Bytes, low: int = low) -> None:
                await take(numbers + low, data)

            work = _Fetch(self, domain, digests[part], fingerprints[part], take_part)
            found = await work.run(self._hosts, hints)
            missing.append(Missing(found.numbers + low, found.gone))
        return Missing(
            np.concatenate([np.empty(0, np.intp), *(each.numbers for each in missing)]),
            np.concatenate([np.empty(0, np.bool_), *(each.gone for each in missing)]),
        )

    def lied(self, host: Host, pages: int) -> None:
        """Count pages of a host that did not have their digest."""
        self.counts.wrong += pages
        host.lied(pages, "the bytes do not have the digest")


class _Fetch:
    """One round: up to ROUND_PAGES pages."""

    def __init__(
        self,
        fetcher: Fetcher,
        domain: Domain,
        digests: Digests,
        fingerprints: Fingerprints,
        take: Take,
    ) -> None:
        self._fetcher = fetcher
        self._domain = domain
        self._digests = digests
        self._fingerprints = fingerprints
        self._take = take
        self._wanted: Mask = ~are_zero(digests)
        self._asked_at: npt.NDArray[np.float64] = np.zeros(len(digests))
        self._may: dict[Host, Mask] = {}
        self._denials = np.zeros(len(digests), np.int32)
        self._certain = True
        self._changed = asyncio.Event()
        self._takes: set[asyncio.Future[None]] = set()
        self._work_seconds = _PATIENCE_SECONDS

    async def run(self, hosts: Hosts, hints: Sequence[str]) -> Missing:
        """Fetch what can be; return the rest."""
        everyone: dict[str, Host] = {}
        try:
            everyone = await hosts.live()
            named = [everyone[name] for name in hints if name in everyone]
        except HostAwayError as error:
            log.info("cannot ask who there is", why=error.args[0])
            self._certain = False
            named = hosts.known(hints)
        may = {host: self._wanted.copy() for host in named}
        # Where nobody else is there is nobody to look for.
        if len(self._fingerprints) and len(everyone) > len(named):
            for host, mask in (await self._indexed(hosts)).items():
                may.setdefault(host, mask)
        asked = {host: mask.copy() for host, mask in may.items()}
        await self._ask(may)
        # Whom the index named for some pages may have the others too.
        rest = {host: self._wanted.copy() for host in everyone.values()}
        for host, mask in asked.items():
            rest[host] = self._wanted & ~mask
        await self._ask(rest)
        numbers = np.flatnonzero(self._wanted)
        all_said_no = self._denials[numbers] >= len(everyone)
        return Missing(numbers, all_said_no & self._certain)

    async def _indexed(self, hosts: Hosts) -> dict[Host, Mask]:
        numbers = np.flatnonzero(self._wanted)
        try:
            held = await hosts.holders(self._domain.id, self._fingerprints[numbers])
        except HostAwayError as error:
            log.info("cannot look up holders", why=error.args[0])
            self._certain = False
            return {}
        spread = neighbourhood(self._fingerprints[numbers], held.values())
        may = {}
        for host, mask in held.items():
            may[host] = np.zeros(self._wanted.size, np.bool_)
            may[host][numbers] = widen(mask, spread)
        return may

    async def _ask(self, may: dict[Host, Mask]) -> None:
        """Ask hosts for the pages that each may have."""
        self._may = may
        willing = [host for host in may if not host.avoided]
        self._certain = self._certain and len(willing) == len(may)
        for low in range(0, len(willing), WORKS_AT_ONCE):
            if self._wanted.any():
                await self._ask_some(willing[low : low + WORKS_AT_ONCE])

    async def _ask_some(self, hosts: Sequence[Host]) -> None:
        self._asked_at[:] = 0
        works = min(WORKS_A_HOLDER, WORKS_AT_ONCE // len(hosts))
        workers = [
            asyncio.ensure_future(self._work(host))
            for host, _ in itertools.product(hosts, range(works))
        ]
        try:
            for worker in asyncio.as_completed(workers):
                await worker
                if not self._wanted.any():
                    # Whoever is asked still is too slow; what was sent is handed over.
                    break
            await asyncio.gather(*self._takes)
        finally:
            left = [each for each in (*workers, *self._takes) if not each.done()]
            for each in left:
                each.cancel()
            if left:
                await asyncio.wait(left)

    async def _work(self, host: Host) -> None:
        while True:
            numbers = self._next(host)
            if numbers.size:
                self._may[host][numbers] = False
                self._asked_at[numbers] = time.monotonic()
                if not await self._fetch(host, numbers):
                    return
                continue
            if not (self._wanted & self._may[host]).any():
                return
            # Others were asked for all that is left: see whether they are slow.
            changed = self._changed
            try:
                async with asyncio.timeout(self._patience()):
                    await changed.wait()
            except TimeoutError:
                continue

    def _next(self, host: Host) -> Indices:
        """Return the next work for a host, nothing when there is none now."""
        mine = self._wanted & self._may[host]
        free = np.flatnonzero(mine & (self._asked_at == 0))[:WORK_PAGES]
        if free.size:
            return free
        late = np.flatnonzero(mine & (self._asked_at < time.monotonic() - self._patience()))
        late = late[:WORK_PAGES]
        if late.size:
            self._fetcher.counts.slow += 1
        return late

    def _patience(self) -> float:
        return max(_PATIENCE_SECONDS, _PATIENCE_WORKS * self._work_seconds)

    async def _fetch(self, host: Host, numbers: Indices) -> bool:
        """Ask a host for pages; return whether to go on with it."""
        fingerprints = self._fingerprints[numbers] if len(self._fingerprints) else b""
        request = pages_pb2.FetchRequest(
            domain_id=self._domain.id,
            digests=self._digests[numbers].tobytes(),
            fingerprints=bytes(fingerprints),
        )
        begun = time.monotonic()
        try:
            response = await host.fetch(request, _WORK_SECONDS)
        except HostAwayError:
            self._certain = False
            self._asked_at[numbers] = 0
            self._notify()
            return False
        seconds = time.monotonic() - begun
        self._work_seconds = min(seconds, self._work_seconds)
        found = np.frombuffer(response.found, np.bool_)
        sent = numbers[found]
        pages = response.pages
        digests = await self._domain.digester.pages_apart(pages)
        good = equal(digests, self._digests[sent])
        refused = np.concatenate((numbers[~found], sent[~good]))
        self._asked_at[refused] = 0
        self._denials[numbers[~found]] += 1
        if not good.all():
            self._certain = False
            self._fetcher.lied(host, int(np.count_nonzero(~good)))
        await self._hand_over(sent, good, pages)
        self._notify()
        return bool(good.all())

    async def _hand_over(self, sent: Indices, good: Mask, pages: memoryview) -> None:
        """Hand the pages to whoever wants them, unless another holder was faster."""
        new = good & self._wanted[sent]
        self._wanted[sent[new]] = False
        if new.any():
            self._fetcher.counts.fetched += int(np.count_nonzero(new))
            data: Bytes = pages
            if not new.all():
                rows = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_SIZE)
                data = rows[new].tobytes()
            taking = asyncio.ensure_future(self._take(sent[new], data))
            self._takes.add(taking)
            await asyncio.shield(taking)
            self._takes.discard(taking)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def neighbourhood(fingerprints: Fingerprints, held: Iterable[Mask]) -> int:
    """Return for how many pages to each side a hit stands: 0 when all are in the index.

    A sampled index has only fingerprints whose lowest bits are zero; how many, those that it has
    tell.
    """
    hits = np.zeros(len(fingerprints), np.bool_)
    for mask in held:
        hits |= mask
    if not hits.any():
        return 0
    # Fingerprints are big-endian: the last two bytes have the lowest bits.
    low = fingerprints[hits, -2].astype(np.int64) << 8 | fingerprints[hits, -1]
    all_bits = int(np.bitwise_or.reduce(low)) | 1 << 16
    zeros = (all_bits & -all_bits).bit_length() - 1
    return _NEIGHBOURHOOD << zeros if zeros else 0


def widen(mask: Mask, pages: int) -> Mask:
    """Return the mask with so many more to each side of what is set."""
    if not pages:
        return mask
    steps = np.zeros(mask.size + 1, np.int32)
    hits = np.flatnonzero(mask)
    np.add.at(steps, np.maximum(hits - pages, 0), 1)
    np.subtract.at(steps, np.minimum(hits + pages + 1, mask.size), 1)
    wide: Mask = np.cumsum(steps[:-1]) > 0
    return wide
