"""Sees that bytes which are about to leave this host's memory are safe elsewhere.

Safe is what at least `min_holders` other live hosts hold under a lease, or what is in the spill
files. Hosts that the index names for the fingerprints are asked to hold, for each page as few as
will do, in an order that changes from batch to batch so that the load spreads; whatever does not
find enough of them is spilled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import structlog

from samepage.daemon.failpoints import failpoint
from samepage.daemon.policies import Policies
from samepage_merger.cluster.away import Bytes, Digests, Mask
from samepage_merger.cluster.digests import Fingerprints
from samepage_merger.cluster.fetch import neighbourhood, widen
from samepage_merger.cluster.hosts import HostAwayError, Hosts
from samepage_merger.cluster.leases import Grants, Leases
from samepage_merger.cluster.spill import Spill
from samepage_merger.config import Config
from samepage_merger.domains import Domain

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Pages:
    """Pages that somebody wants to be safe elsewhere; their digests are pinned meanwhile."""

    domain: Domain
    digests: Digests
    fingerprints: Fingerprints
    data: Bytes


@dataclass(frozen=True)
class Safe:
    """Which pages are held by enough other hosts, and which were spilled."""

    held: Mask
    spilled: Mask


class Securer:
    """Has pages held by other hosts, or spills them.

    Args:
        spill: None where nothing is spilled.
    """

    def __init__(
        self,
        policies: Policies[Config],
        hosts: Hosts,
        grants: Grants,
        leases: Leases,
        spill: Spill | None,
    ) -> None:
        self._policies = policies
        self._hosts = hosts
        self._grants = grants
        self._leases = leases
        self._spill = spill
        self._turn = itertools.count()

    @property
    def possible(self) -> bool:
        """Whether there is anywhere for pages to be."""
        return bool(self._policies.current.index) or self._spill is not None

    @property
    def min_holders(self) -> int:
        """How many other hosts must hold a page."""
        return self._policies.current.min_holders

    async def secure(self, pages: Pages, besides: str = "") -> Safe:
        """See that pages are safe; `besides` is a host that does not count, nor is asked."""
        try:
            held = await self._hold(pages, besides)
        except HostAwayError as error:
            log.info("no other host is asked to hold pages", why=str(error))
            held = np.zeros(len(pages.digests), np.bool_)
        failpoint("evict.held")
        spilled = np.zeros(held.size, np.bool_)
        rest = np.flatnonzero(~held)
        if self._spill is not None and rest.size:
            data = np.frombuffer(pages.data, np.uint8).reshape(held.size, -1)[rest]
            spilled[rest] = await self._spill.write(pages.digests[rest], data.tobytes())
        return Safe(held, spilled)

    async def _hold(self, pages: Pages, besides: str) -> Mask:
        """Return which pages enough live hosts hold, then if not now."""
        domain, digests, fingerprints = pages.domain, pages.digests, pages.fingerprints
        live = [name for name in await self._hosts.live() if name != besides]
        if len(live) < self.min_holders:
            return np.zeros(len(digests), np.bool_)
        indexed = await self._hosts.holders(domain.id, fingerprints)
        spread = neighbourhood(fingerprints, indexed.values())
        turn = next(self._turn)
        for host, has in _rotated(list(indexed.items()), turn):
            short = self._grants.count(domain, digests, live) < self.min_holders
            rows = np.flatnonzero(short & widen(has, spread))
            if rows.size and host.name in live:
                await self._leases.hold(domain, host, digests[rows], fingerprints[rows])
        enough: Mask = self._grants.count(domain, digests, live) >= self.min_holders
        return enough


def _rotated(items: list[T], turn: int) -> list[T]:
    first = turn % len(items) if items else 0
    return items[first:] + items[:first]
