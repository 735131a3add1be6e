"""Hands cold pages to the merger, which lets them leave the host (docs/cluster.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import structlog

from samepage.daemon.policies import Policies
from samepage_scanner.attention import BLOCK_PAGES, runs
from samepage_scanner.books import Arena, Domain
from samepage_scanner.budget import Budget
from samepage_scanner.config import Config
from samepage_scanner.merging import BACKGROUND_PAGES_MAX, MergerAwayError, MergerClient

_BLOCKS_MAX = BACKGROUND_PAGES_MAX // BLOCK_PAGES

log = structlog.get_logger(__name__)


class Evictions:
    """Has cold blocks evicted, at the expense of the budget.

    Args:
        interrupted: whether somebody waits for a share.

    Attributes:
        evicted: pages that left, since start.
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
        self.evicted = 0

    async def evict(self, domain: Domain) -> None:
        """Hand over what is cold in a domain, unless the policy is to evict nothing."""
        idle = self._policies.current.evict_idle_seconds
        if not idle:
            return
        try:
            for arena in list(domain.arenas):
                await self._evict_arena(arena, idle)
        except MergerAwayError as error:
            log.info("cold pages stay", domain=domain.name, why=str(error))

    async def _evict_arena(self, arena: Arena, idle: float) -> None:
        attention = arena.attention
        looked_at = (attention.rest == 0) & ~attention.stale
        blocks = np.flatnonzero(arena.coldness.cold(idle) & looked_at)
        for low in range(0, blocks.size, _BLOCKS_MAX):
            await self._budget.admit()
            if self._interrupted() or arena.closed:
                return
            part = blocks[low : low + _BLOCKS_MAX]
            mask = np.zeros(looked_at.size, np.bool_)
            mask[part] = True
            ranges = runs(mask) * BLOCK_PAGES
            ranges[-1, 1] = min(ranges[-1, 1], len(arena.pages) - ranges[-1, 0])
            async with self._merger.charged(self._budget, {arena.agent}):
                self.evicted += await self._merger.evict(arena, ranges)
            arena.coldness.evicted(part, arena.tracked)
            attention.mark(ranges[:, 0], ranges[:, 1])
            await asyncio.sleep(0)
