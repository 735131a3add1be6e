"""Deletes what hosts without a lease left behind."""

from __future__ import annotations

import asyncio
import uuid

import structlog

from samepage_index.entries import Entries
from samepage_index.errors import StoreUnavailableError
from samepage_index.fingerprints import SHARDS
from samepage_index.hosts import NUMBER_BYTES, Hosts

# A bucket is searched once for each.
_NUMBERS_A_PASS = 64
_TURN_MS = 60_000

log = structlog.get_logger(__name__)


class Janitor:
    """Sweeps the entries of hosts that are gone. Of several index processes one sweeps at a time.

    Args:
        keep_ms: how long after its lease a host's entries are kept.
        interval: seconds between two passes.
    """

    def __init__(self, hosts: Hosts, entries: Entries, keep_ms: int, interval: float) -> None:
        self._hosts = hosts
        self._entries = entries
        self._keep_ms = keep_ms
        self._interval = interval
        self._name = uuid.uuid4().hex

    async def run_once(self) -> int:
        """One pass. Returns how many entries were deleted.

        Raises:
            StoreUnavailableError: Redis cannot be used; the next pass does what is left.
        """
        if not await self._has_turn():
            return 0
        numbers = await self._hosts.condemn(self._keep_ms, _NUMBERS_A_PASS)
        swept = 0
        for domain_id in await self._entries.domains():
            for shard in range(SHARDS) if numbers else ():
                # Whoever has the turn next may give the numbers to other hosts.
                if not await self._has_turn():
                    return swept
                swept += await self._entries.sweep_shard(domain_id, shard, numbers)
            await self._entries.forget_if_empty(domain_id)
        if numbers:
            await self._hosts.release(numbers)
            log.info("swept", entries=swept, hosts=len(numbers) // NUMBER_BYTES)
        return swept

    async def run_forever(self) -> None:
        """A pass, a pause, and again, until cancelled."""
        while True:
            try:
                await self.run_once()
            except StoreUnavailableError as error:
                log.warning("cannot sweep", error=str(error))
            await asyncio.sleep(self._interval)

    async def _has_turn(self) -> bool:
        return await self._hosts.take_turn(self._name, _TURN_MS)
