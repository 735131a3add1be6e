"""Hosts that evict pages to each other and to disk, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent
from helpers.merger_host import SECRET
from helpers.pages_host import PagesCluster, PagesHost, fingerprints_of
from helpers.waiting import until

from samepage.daemon.policies import Policies
from samepage_merger.cluster.elsewhere import Elsewhere
from samepage_merger.config import Config

Pages = np.ndarray[Any, np.dtype[np.uint8]]


class EvictingHost(PagesHost):
    """One host whose arenas can be evicted.

    Args:
        settings: of its merger, where they are not the defaults.
    """

    def __init__(
        self, name: str, directory: Path, store: Path, index: str, settings: dict[str, Any]
    ) -> None:
        super().__init__(name, directory, store, index)
        self._settings = settings

    async def start(self) -> None:
        await super().start()
        spill_dir = self.path.parent / "spill"
        config = Config(node=self.name, index=self._index, spill_dir=spill_dir)
        self.elsewhere = Elsewhere(
            Policies(replace(config, **self._settings)),
            self.domains,
            self.agents.find,
            self.orders,
            self.hosts,
            self.fetcher,
            SECRET,
        )
        self.agents.requests = self.elsewhere
        self.servicer.keeper = self.elsewhere.keeper
        self.connected: list[FakeMergingAgent] = []

    async def end(self, *, crash: bool = False) -> None:
        for agent in () if crash else self.connected:
            await agent.die()
        await self.elsewhere.close()
        await super().end(crash=crash)

    async def agent(self) -> FakeMergingAgent:
        """An agent that is connected here."""
        agent = FakeMergingAgent(self.path)
        await agent.connect()
        self.connected.append(agent)
        return agent

    def spilled(self) -> int:
        """Pages in the spill files."""
        assert self.elsewhere.spill is not None
        return len(self.elsewhere.spill)


class EvictingCluster(PagesCluster):
    """Hosts that evict.

    Args:
        settings: of their mergers, where they are not the defaults.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        super().__init__(directory)
        self._settings = settings

    def make_host(self, name: str, directory: Path, store: Path, index: str) -> EvictingHost:
        return EvictingHost(name, directory, store, index, self._settings)

    async def add(self, name: str) -> EvictingHost:
        host = await super().add(name)
        assert isinstance(host, EvictingHost)
        return host

    async def with_copy(self, name: str, data: Pages) -> EvictingHost:
        """A host one of whose arenas has these pages, and the index knows."""
        host = await self.add(name)
        agent = await host.agent()
        host.locate(agent, await agent.open("copy", data))
        self.index.held[name] = {fingerprint.tobytes() for fingerprint in fingerprints_of(data)}
        return host


@asynccontextmanager
async def evicting_cluster(directory: Path, **settings: Any) -> AsyncIterator[EvictingCluster]:
    """A cluster without hosts, whose mergers will have these settings."""
    async with EvictingCluster(directory, settings) as cluster:
        yield cluster


async def came_back(arena: FakeArena, data: Pages) -> None:
    """Wait until all of an arena is there again, and see that it is as it was."""
    await until(lambda: not arena.away)
    assert not arena.poisoned.any()
    assert arena.view() == data.tobytes()


async def swept(host: EvictingHost, condition: Callable[[], bool]) -> None:
    """Sweep until what nobody needs is gone."""
    async with asyncio.timeout(20):
        while not condition():
            await host.elsewhere.keeper.sweep()
            await asyncio.sleep(0.01)
