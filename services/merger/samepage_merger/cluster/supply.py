"""Where the bytes of a digest come from, in this order: this host's store, the spill files, and the
other hosts, those first that are known to hold it. All of it is checked by its digest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.digests import Digester, are_zero, equal
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.leases import Grants
from samepage_merger.cluster.returning import Supplied, Whereabouts
from samepage_merger.cluster.spill import Spill
from samepage_merger.domains import Domain
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Indices, Int64s

_NO_FINGERPRINTS = np.empty((0, 16), np.uint8)


class PageSupply:
    """Finds pages by digest.

    Args:
        spill: None where nothing is spilled.
        grants: which hosts hold what for this one.
    """

    def __init__(self, spill: Spill | None, fetcher: Fetcher, grants: Grants) -> None:
        self._spill = spill
        self._fetcher = fetcher
        self._grants = grants

    async def get(self, domain: Domain, digests: Digests) -> Supplied:
        """Return the pages with these digests; a digest may be named more than once."""
        work = _Work(domain, digests)
        work.found |= are_zero(digests)
        await self._from_store(work)
        await self._from_spill(work)
        gone = await self._from_hosts(work)
        whereabouts = np.full(len(digests), Whereabouts.UNKNOWN, np.uint8)
        whereabouts[gone] = Whereabouts.LOST
        whereabouts[work.found] = Whereabouts.FOUND
        return Supplied(whereabouts, work.data())

    async def _from_store(self, work: _Work) -> None:
        rows = work.missing()
        if not rows.size:
            return
        domain = work.domain
        async with domain.catalog.found(work.digests[rows]) as slots:
            here = slots != PRIVATE
            if here.any():
                work.keep(rows[here], domain.store.read_all(slots[here]))

    async def _from_spill(self, work: _Work) -> None:
        rows = work.missing()
        if self._spill is None or not rows.size:
            return
        found = await self._spill.read(work.digests[rows], _checker(work.domain.digester))
        work.keep(rows[found.mask], found.data)

    async def _from_hosts(self, work: _Work) -> Int64s:
        """Fetch what is missing; return the rows that nobody has."""
        rows = work.missing()
        if not rows.size:
            return rows
        digests = work.digests[rows]
        hints = [host for host, _ in self._grants.holders(work.domain, digests)]
        if rows.size == 1:
            page = await self._fetcher.page(work.domain, digests.tobytes(), hints)
            if page is not None:
                work.keep(rows, page)
                return rows[:0]

        async def take(numbers: Indices, data: Bytes) -> None:
            work.keep(rows[numbers], data)

        missing = await self._fetcher.fetch(work.domain, digests, _NO_FINGERPRINTS, hints, take)
        return rows[missing.numbers[missing.gone]]


class _Work:
    """Pages by digest, as they come in; those that hold only zeros are there from the start."""

    def __init__(self, domain: Domain, digests: Digests) -> None:
        self.domain = domain
        self.digests = digests
        self.found = np.zeros(len(digests), np.bool_)
        self._data = np.zeros((len(digests), PAGE_SIZE), np.uint8)

    def missing(self) -> Int64s:
        """Return the rows that have not come."""
        return np.flatnonzero(~self.found)

    def keep(self, rows: Int64s, data: Bytes) -> None:
        """Take in pages of some rows."""
        self._data[rows] = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
        self.found[rows] = True

    def data(self) -> Bytes:
        """Return the pages that have come, in order."""
        return (self._data if self.found.all() else self._data[self.found]).tobytes()


def _checker(digester: Digester) -> Callable[[Digests, Bytes], Mask]:
    def check(digests: Digests, data: Bytes) -> Mask:
        return equal(digester.pages(data), digests)

    return check
