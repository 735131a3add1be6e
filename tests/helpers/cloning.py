"""A merger that clones from a fake source, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from fakes.cloning_agent import CloningAgent
from fakes.fake_source import FakeSource
from helpers.merger_host import DOMAIN, MergerHost
from helpers.waiting import until

from samepage.daemon import wire
from samepage.v1 import pages_pb2, pages_pb2_grpc
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.clone import Clones, Services
from samepage_merger.cluster.digests import Fingerprints
from samepage_merger.cluster.fetch import Missing, Take
from samepage_merger.cluster.handover import HandOvers
from samepage_merger.cluster.journal import Journal
from samepage_merger.cluster.landing import Tools
from samepage_merger.cluster.source import told
from samepage_merger.domains import Domain
from samepage_merger.mappings import MappingBudget
from samepage_merger.runs import Int64s

SOURCE = "host-b"
PAGES = 3000
ZEROS = 100
LEASE_SECONDS = 3.0


class OneHost:
    """The cluster's hosts: the source alone, for as long as it has a lease."""

    def __init__(self, source: FakeSource) -> None:
        self.gone = False
        self.channel = grpc.aio.insecure_channel(source.address)

    @property
    def stub(self) -> pages_pb2_grpc.PagesAsyncStub:
        """How the source is called."""
        return pages_pb2_grpc.PagesStub(self.channel)

    async def live(self) -> Mapping[str, OneHost]:
        """Who has a lease."""
        return {} if self.gone else {SOURCE: self}

    async def find(self, name: str) -> OneHost | None:
        """Who has a lease, by name."""
        return (await self.live()).get(name)

    def known(self, names: Iterable[str]) -> list[OneHost]:
        """Who was ever heard of."""
        return [self for name in names if name == SOURCE]


class FromSource:
    """Finds what the store has, and fetches the rest from the source, page by page."""

    def __init__(self, hosts: OneHost) -> None:
        self._hosts = hosts

    def slots(
        self, domain: Domain, digests: Digests, fingerprints: Fingerprints
    ) -> AbstractAsyncContextManager[Int64s]:
        return domain.catalog.found(digests)

    async def fetch(
        self,
        domain: Domain,
        digests: Digests,
        fingerprints: Fingerprints,
        hints: Sequence[str],
        take: Take,
    ) -> Missing:
        stub = self._hosts.stub
        for low in range(0, len(digests), 256):
            some = digests[low : low + 256]
            request = pages_pb2.FetchRequest(domain_id=domain.id, digests=some.tobytes())
            with told(hints[0]):
                async for response in stub.Fetch(iter([request])):
                    assert (domain.digester.pages(response.pages) == some).all()
                    await take(np.arange(low, low + len(some)), response.pages)
        return Missing(np.empty(0, np.intp), np.empty(0, np.bool_))


class CloningHost(MergerHost):
    """A merger with the destination's side of clones."""

    def __init__(self, directory: Path, store: Path, source: FakeSource, **options: Any) -> None:
        super().__init__(directory, store, **options)
        self.hosts = OneHost(source)
        self.journal = Journal(store)
        self.handovers = HandOvers(self.hosts, self.journal, self.domains)
        there = FromSource(self.hosts)
        tools = Tools(
            self.orders, self.headroom, MappingBudget(self.policies, self.orders), there, there
        )
        services = Services(
            "host-a", self.hosts, tools, self.domains, self.journal, lease_seconds=LEASE_SECONDS
        )
        self.clones = Clones(services, self.handovers)
        self.agents.clones = self.clones
        self.handovers.start()

    async def kill(self) -> None:
        """End as kill -9 ends it, as far as others can tell."""
        self.handovers.end = lambda note: None  # type: ignore[method-assign]  # nobody is told
        await self.clones.close()
        await self.handovers.close()
        await self.hosts.channel.close()
        self.crash()

    async def end(self) -> None:
        """End in order, unless it was killed."""
        await self.clones.close()
        await self.handovers.close()
        await self.hosts.channel.close()
        self.stop()


@asynccontextmanager
async def cloning_host(
    directory: Path, store: Path, source: FakeSource, **options: object
) -> AsyncIterator[CloningHost]:
    """Run one for as long as the context lasts."""
    host = CloningHost(directory, store, source, **options)
    try:
        yield host
    finally:
        await host.end()


def wanted(
    source: str = "there",
    name: str = "here",
    *,
    host: str = SOURCE,
    lazy: bool = False,
    migrate: bool = False,
    max_freeze_ms: int = 500,
    domain: str = DOMAIN,
) -> wire.Clone:
    """What CLONE asks for."""
    return wire.Clone(lazy, migrate, max_freeze_ms, host, source, name, domain)


def pages(count: int, seed: int = 1) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Pages of which no two are equal."""
    made = np.random.default_rng(seed).integers(0, 256, (count, wire.PAGE_SIZE), np.uint8)
    made[:, 0] = 1
    return made


async def nothing_left(host: CloningHost, source: FakeSource, agent: CloningAgent) -> None:
    """See that a clone that failed has left nothing, here nor there."""
    await until(lambda: not (source.snapshots or host.journal.read()))
    await until(lambda: not len(host.clones))
    assert not source.kept
    await host.settled()
    host.assert_exact(agent)


def hang_at(source: FakeSource, wanted_call: str) -> asyncio.Event:
    """Let calls of one kind never be answered; return what is set when there is one."""
    reached = asyncio.Event()

    async def hang(call: str) -> None:
        if call == wanted_call:
            reached.set()
            await asyncio.Event().wait()

    source.before = lambda call, context: hang(call)
    return reached
