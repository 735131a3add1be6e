"""Frees what no living process can map any more, as soon as the kernel says so, and what the heap
keeps for buffers that do not come."""

from __future__ import annotations

import asyncio

from samepage.daemon import heap
from samepage_merger.domains import Domains

_BUSY_SECONDS = 0.2
_IDLE_SECONDS = 5.0


class Janitor:
    """The loop that looks after arenas in limbo and slots that nobody knows."""

    def __init__(self, domains: Domains) -> None:
        self._domains = domains
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._woken.set()

    def run_once(self) -> bool:
        """Free what can be freed; return whether nothing is left waiting."""
        return all([domain.settle() for domain in self._domains])

    async def run_forever(self) -> None:
        """Look often while something waits, and now and then otherwise."""
        while True:
            self._woken.clear()
            idle = self.run_once()
            try:
                async with asyncio.timeout(_IDLE_SECONDS if idle else _BUSY_SECONDS):
                    await self._woken.wait()
            except TimeoutError:
                if idle:
                    heap.trim()
