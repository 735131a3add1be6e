"""Keeps what is away safe for as long as it is away, and lets go of it afterwards.

Theory. Once in a while the books of away pages are held against what is known of the bytes: which
live hosts hold them, and what is in the spill files.
- A page that nobody is known to hold (after a restart that is all of them) is asked for at every
  live host, by its digest.
- A page that too few hosts hold, since one died, let go, or its lease could not be renewed in time,
  is fetched, and made safe anew: held by another host, or spilled; where neither can be, it comes
  home.
- What is held or spilled and not needed any more is released, when it was not needed the time
  before either.
Leases are renewed three times within their length. Whatever came to be needed while this was being
found out is left alone: digests are pinned before anybody relies on them.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import structlog

from samepage.daemon import secrets
from samepage_merger.arena import Arena
from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import are_zero, fingerprints, in_thread
from samepage_merger.cluster.hosts import Host, HostAwayError, Hosts
from samepage_merger.cluster.keys import Keys, keys_of
from samepage_merger.cluster.leases import Grants, Leases
from samepage_merger.cluster.marks import Names, digests_named, names_of
from samepage_merger.cluster.returning import Returner, Supply, Whereabouts
from samepage_merger.cluster.securing import Pages, Securer
from samepage_merger.cluster.spill import Spill
from samepage_merger.domains import Domain, Domains
from samepage_merger.runs import Int64s

_BATCH_PAGES = 512
_PAUSE_SECONDS = 5.0
_RENEWALS = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Means:
    """What keeping is done with.

    Attributes:
        spill: None where nothing is spilled.
        secret: the cluster's, from which the seeds of fingerprints are derived.
    """

    domains: Domains
    hosts: Hosts
    grants: Grants
    leases: Leases
    securer: Securer
    supply: Supply
    returner: Returner
    spill: Spill | None
    secret: bytes


class Keeper:
    """Keeps away pages safe.

    Args:
        lease_seconds: how long a hold lasts unless renewed.

    Attributes:
        exempt: arenas whose pages are on their way here already, and are left to that.
        secured: pages that were made safe anew, since start.
    """

    def __init__(self, means: Means, lease_seconds: float) -> None:
        self._means = means
        self._renew_seconds = lease_seconds / _RENEWALS
        self._renewed: dict[str, float] = {}
        self._free_grants: dict[tuple[Domain, str], Names] = {}
        self._free_spilled: Int64s = np.empty(0, np.int64)
        self._old_after = time.monotonic() + lease_seconds
        self._woken = asyncio.Event()
        self.exempt: set[Arena] = set()
        self.secured = 0

    def wake(self) -> None:
        """There may be something to do."""
        self._woken.set()

    async def run_forever(self) -> None:
        """Look now and then."""
        while True:
            self._woken.clear()
            try:
                await self.run_once()
            except HostAwayError as error:
                log.info("away pages were not looked after", why=str(error))
            try:
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def run_once(self) -> None:
        """Look after everything.

        Raises:
            HostAwayError: the index is away: nothing is known of the other hosts.
        """
        await self.sweep()
        live = await self._renew()
        for domain in list(self._means.domains):
            await self._audit(domain, live)

    async def retire(self) -> None:
        """Release what is not needed, which the merger that comes next would not know of."""
        await self.sweep()
        await self.sweep()

    async def let_go(self, domain_id: bytes, holder: str, digests: Digests) -> Mask:
        """Return which digests a holder may let go of: those that are safe without it.

        Raises:
            HostAwayError: the index is away.
        """
        domain = self._means.domains.find(domain_id)
        agreed = np.ones(len(digests), np.bool_)
        if domain is None:
            return agreed
        with domain.pins.kept(digests):
            live = await self._means.hosts.live()
            rows = np.flatnonzero(np.isin(names_of(digests), names_of(domain.away())))
            agreed[rows] = await self._safe(domain, digests[rows], live, besides=holder)
        self._means.grants.remove(domain, holder, digests[agreed])
        return agreed

    async def _renew(self) -> dict[str, Host]:
        """Renew what is due, and forget what cannot be relied on; return the live hosts."""
        hosts, grants = self._means.hosts, self._means.grants
        for name in grants.hosts():
            # What it may hold still, from before a restart, ends with its lease.
            if not grants.of_host(name):
                grants.forget(name)
                self._renewed.pop(name, None)
        for host in hosts.known(grants.hosts()):
            await self._renew_at(host)
        live = await hosts.live()
        for name in grants.hosts():
            too_late = self._renewed.setdefault(name, time.monotonic()) + 2 * self._renew_seconds
            if name not in live or time.monotonic() >= too_late:
                log.warning("a holder cannot be relied on any more", host=name, live=name in live)
                grants.forget(name)
                del self._renewed[name]
        return live

    async def _renew_at(self, host: Host) -> None:
        grants, leases = self._means.grants, self._means.leases
        now = time.monotonic()
        if now < self._renewed.setdefault(host.name, now) + self._renew_seconds:
            return
        agrees = await leases.renew(host)
        if agrees is not None:
            self._renewed[host.name] = now
        if agrees is False:
            for domain in list(self._means.domains):
                await leases.hold(domain, host, grants.of(domain, host.name))

    async def _audit(self, domain: Domain, live: dict[str, Host]) -> None:
        """See that every away page of a domain is safe."""
        maps = [arena.away for arena in domain.arenas if arena not in self.exempt]
        digests = np.concatenate(
            [np.empty((0, 32), np.uint8), *(away.digests(away.all()) for away in maps)]
        )
        names = await in_thread(lambda: np.unique(names_of(digests)), len(digests))
        digests = digests_named(names)
        digests = digests[~are_zero(digests)]
        if not len(digests):
            return
        unknown = digests[~self._safe_now(domain, digests, live)]
        unknown = unknown[self._means.grants.count(domain, unknown, live) == 0]
        for host in live.values() if len(unknown) else ():
            await self._means.leases.hold(domain, host, unknown)
        short = digests[~self._safe_now(domain, digests, live)]
        for low in range(0, len(short), _BATCH_PAGES):
            part = short[low : low + _BATCH_PAGES]
            with domain.pins.kept(part):
                safe = await self._safe(domain, part, live)
            if not safe.all():
                await self._bring_home(domain, part[~safe])

    def _safe_now(self, domain: Domain, digests: Digests, live: Iterable[str]) -> Mask:
        """Return which digests enough live hosts hold, or are in the spill files."""
        count = self._means.grants.count(domain, digests, live)
        safe: Mask = count >= self._means.securer.min_holders
        if self._means.spill is not None:
            safe |= np.isin(keys_of(digests), self._means.spill.entries()[0])
        return safe

    async def _safe(
        self, domain: Domain, digests: Digests, live: Iterable[str], besides: str = ""
    ) -> Mask:
        """Make digests safe that are not yet; return which are, then."""
        safe = self._safe_now(domain, digests, [name for name in live if name != besides])
        for low in range(0, len(digests), _BATCH_PAGES):
            rows = low + np.flatnonzero(~safe[low : low + _BATCH_PAGES])
            if not rows.size:
                continue
            supplied = await self._means.supply.get(domain, digests[rows])
            rows = rows[supplied.whereabouts == Whereabouts.FOUND]
            seed = secrets.domain_seed(self._means.secret, domain.name)
            pages = Pages(domain, digests[rows], fingerprints(seed, supplied.data), supplied.data)
            made = await self._means.securer.secure(pages, besides)
            safe[rows] = made.held | made.spilled
            self.secured += int(np.count_nonzero(safe[rows]))
        return safe

    async def _bring_home(self, domain: Domain, digests: Digests) -> None:
        """Let pages come back that are safe nowhere else, as far as they can be had."""
        names = names_of(digests)
        for arena in list(domain.arenas):
            pages = arena.away.all()
            pages = pages[np.isin(names_of(arena.away.digests(pages)), names)]
            if pages.size:
                came = await self._means.returner.bring(arena, pages)
                log.warning(
                    "away pages that too few hosts hold, and cannot be spilled, come back",
                    arena=arena.name,
                    pages=pages.size,
                    came=came,
                )

    async def sweep(self) -> None:
        """Let go of what nobody needs, and nobody needed the last time."""
        needed: dict[Domain, Keys] = {}
        for domain in list(self._means.domains):
            domain.pins.forget_recent()
            digests = domain.needed()
            needed[domain] = await in_thread(functools.partial(_keys, digests), len(digests))
        await self._sweep_grants(needed)
        if self._means.spill is not None:
            await self._sweep_spill(self._means.spill, needed)

    async def _sweep_grants(self, needed: dict[Domain, Keys]) -> None:
        grants, hosts = self._means.grants, self._means.hosts
        before, self._free_grants = self._free_grants, {}
        for domain, keys in needed.items():
            for name, digests in grants.unneeded(domain, keys):
                names = names_of(digests)
                self._free_grants[domain, name] = names
                again = np.isin(names, before.get((domain, name), names[:0]))
                free = digests[again & ~np.isin(keys_of(digests), _keys(domain.pins.recent()))]
                if len(free):
                    await self._means.leases.release(domain, hosts.known([name]), name, free)

    async def _sweep_spill(self, spill: Spill, needed: dict[Domain, Keys]) -> None:
        keys, locations = spill.entries()
        every = np.concatenate([np.empty(0, np.uint64), *needed.values()])
        dead = await in_thread(lambda: ~np.isin(keys, every), keys.size + every.size)
        if not self._knows_all():
            dead &= ~spill.begun_before(locations)
        for domain in self._means.domains:
            dead &= ~np.isin(keys, _keys(domain.pins.recent()))
        before, self._free_spilled = self._free_spilled, locations[dead]
        free = self._free_spilled[np.isin(self._free_spilled, before)]
        if free.size:
            await spill.drop(free)

    def _knows_all(self) -> bool:
        """Return whether every arena that an earlier merger knew has announced itself, or is gone.

        One whose store is gone has no lock that tells of it: it has until the first lease is over.
        """
        domains = list(self._means.domains)
        return time.monotonic() >= self._old_after and all(d.knows_all() for d in domains)


def _keys(digests: Digests) -> Keys:
    return np.unique(keys_of(digests))
