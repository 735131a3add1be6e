"""All that one merger does about its arenas' pages that are elsewhere, put together."""

from __future__ import annotations

import asyncio

import structlog

from samepage.daemon.policies import Policies
from samepage_merger.agents import Evicted
from samepage_merger.arena import Arena
from samepage_merger.cluster.eviction import Evictor
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.hosts import Hosts
from samepage_merger.cluster.keeping import Keeper, Means
from samepage_merger.cluster.leases import Grants, Leases
from samepage_merger.cluster.returning import Returner
from samepage_merger.cluster.securing import Securer
from samepage_merger.cluster.spill import Spill
from samepage_merger.cluster.supply import PageSupply
from samepage_merger.config import Config
from samepage_merger.domains import Domains
from samepage_merger.merging import FindArena
from samepage_merger.orders import Orders
from samepage_merger.runs import Int64s

log = structlog.get_logger(__name__)


class Elsewhere:
    """Evicts pages, keeps them safe while they are away, and brings them back.

    Args:
        secret: the cluster's.

    Attributes:
        spill: None where nothing is spilled.
        grants: what other hosts hold for this one.

    Raises:
        StoreError: the spill directory will not do.
    """

    def __init__(
        self,
        policies: Policies[Config],
        domains: Domains,
        find: FindArena,
        orders: Orders,
        hosts: Hosts,
        fetcher: Fetcher,
        secret: bytes,
    ) -> None:
        config = policies.current
        self.spill = Spill(config.spill_dir, config.spill_limit_bytes) if config.spill_dir else None
        self.grants = Grants()
        leases = Leases(hosts, self.grants, config.hold_lease_seconds, domains.store_id)
        securer = Securer(policies, hosts, self.grants, leases, self.spill)
        supply = PageSupply(self.spill, fetcher, self.grants)
        self.returner = Returner(orders, supply, config.lost_seconds)
        self.evictor = Evictor(domains, find, orders, securer, secret)
        means = Means(
            domains,
            hosts,
            self.grants,
            leases,
            securer,
            supply,
            self.returner,
            self.spill,
            secret,
        )
        self.keeper = Keeper(means, config.hold_lease_seconds)
        self._policies = policies
        self._domains = domains
        policies.follow(self._policy_changed)
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look after what is away."""
        self._keeping = asyncio.ensure_future(self.keeper.run_forever())

    def fetch(self, arena: Arena, pages: Int64s) -> None:
        """Bring away pages that somebody waits for."""
        self.returner.fetch(arena, pages)

    async def evict(self, arena: Arena, first: Int64s, count: Int64s) -> Evicted:
        """Let ranges of pages leave the host.

        Raises:
            RefusedError: there is nowhere for pages to be.
        """
        return await self.evictor.evict_ranges(arena, first, count)

    def status(self) -> dict[str, int]:
        """Return what GetMergerStatus tells of pages that are elsewhere."""
        spill = self.spill
        return {
            "away_pages": sum(a.away.away for domain in self._domains for a in domain.arenas),
            "held_elsewhere": len(self.grants),
            "spilled": len(spill) if spill is not None else 0,
            "spill_bytes": spill.used_bytes if spill is not None else 0,
            "held_for_others": sum(len(domain.holds) for domain in self._domains),
            "evicted_total": int(self.evictor.outcomes[:2].sum()),
            "returned_total": self.returner.returned,
            "lost_total": self.returner.poisoned,
        }

    async def close(self) -> None:
        """End; what is away stays away, and safe."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        await self.returner.close()
        if self.spill is not None:
            self.spill.close()

    def _policy_changed(self) -> None:
        if self.spill is not None:
            self.spill.limit_bytes = self._policies.current.spill_limit_bytes
