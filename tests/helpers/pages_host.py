"""Mergers that serve pages to each other, in the test's own event loop, and what they ask."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from fakes.fake_cluster import FakeClusterIndex, FakeLocatingScanner
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent
from helpers.merger_host import DOMAIN, SECRET, MergerHost, store_directory

from samepage.daemon import secrets
from samepage.daemon.wire import PAGE_SIZE
from samepage.v1 import index_pb2_grpc, pages_pb2_grpc, scanner_pb2_grpc
from samepage_merger.cluster.answering import Answers
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.data_server import DataServer
from samepage_merger.cluster.digests import (
    Digester,
    Fingerprints,
    fingerprints,
    parse_fingerprints,
)
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.hosts import Hosts
from samepage_merger.cluster.keys import keys_of
from samepage_merger.cluster.local import Local, deposit
from samepage_merger.cluster.locator import Locator
from samepage_merger.cluster.pages import PagesServicer
from samepage_merger.cluster.snapshots import Snapshots

DOMAIN_ID = secrets.domain_id(SECRET, DOMAIN)
SEED = secrets.domain_seed(SECRET, DOMAIN)
DIGESTER = Digester(secrets.digest_key(SECRET, DOMAIN_ID))
NO_FINGERPRINTS: Fingerprints = parse_fingerprints(b"")


def random_pages(count: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Pages that are different from each other."""
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_SIZE), np.uint8)


def digests_of(pages: np.ndarray[Any, np.dtype[np.uint8]]) -> Digests:
    """Their digests in the domain of the tests."""
    return DIGESTER.pages(pages.tobytes())


def fingerprints_of(pages: np.ndarray[Any, np.dtype[np.uint8]]) -> Fingerprints:
    """Their fingerprints in the domain of the tests."""
    return fingerprints(SEED, pages.tobytes())


async def serve(add: Callable[[grpc.aio.Server], None]) -> tuple[grpc.aio.Server, str]:
    """Start a server with some servicers; return it and its address."""
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


class PagesHost(MergerHost):
    """One host: a merger, its Pages service, and a scanner that says what it is told to.

    Attributes:
        data_connections: whether it takes them; set it before the start.
    """

    data_connections = True

    def __init__(self, name: str, directory: Path, store: Path, index: str) -> None:
        super().__init__(directory, store)
        self.name = name
        self._index = index

    async def start(self) -> None:
        self.scanner = FakeLocatingScanner()  # type: ignore[abstract]
        self._scanner_server, target = await serve(
            lambda server: scanner_pb2_grpc.add_ScannerServicer_to_server(self.scanner, server)
        )
        self._locator = Locator(target, self.agents.find)
        self.local = Local(self._locator, self.promoter)
        self.hosts = Hosts(self.name, self._index)
        self.fetcher = Fetcher(self.hosts)
        self.snapshots = Snapshots(
            self.domains, self.orders, self.promoter, self.local, self.fetcher
        )
        self.answers = Answers(self.domains, self.local, self.snapshots)
        self.servicer = PagesServicer(self.domains, self.local, self.snapshots, self.answers)
        self.data_server = DataServer(self.answers)
        if self.data_connections:
            self.servicer.data_port = await self.data_server.start("127.0.0.1:0")
        self.server, self.address = await serve(self.servicer.register)
        self._channel = grpc.aio.insecure_channel(self.address)
        self.pages = pages_pb2_grpc.PagesStub(self._channel)

    async def end(self, *, crash: bool = False) -> None:
        """End in order, or as kill -9 does."""
        await self._channel.close()
        self.servicer.drain()
        await self.data_server.close()
        await self.server.stop(None)
        await self.hosts.close()
        await self._locator.close()
        await self._scanner_server.stop(None)
        if crash:
            self.crash()
        else:
            self.stop()

    def keep(self, pages: np.ndarray[Any, np.dtype[np.uint8]], owner: str = "somebody") -> None:
        """Put pages into the store, held for an owner."""
        digests = digests_of(pages)
        slots, hold = deposit(self.domain, digests, pages.tobytes())
        lease = self.domain.holds.extend(owner, 60.0)
        self.domain.holds.grant(lease, keys_of(digests), slots)
        self.domain.free(self.domain.books.release(hold))

    def locate(self, agent: FakeMergingAgent, arena: FakeArena) -> None:
        """Let the scanner know an arena as it is."""
        for page, fingerprint in enumerate(fingerprints_of(arena.data)):
            self.scanner.places[fingerprint.tobytes()] = (agent.agent, arena.number, page)


class PagesCluster:
    """Hosts that know each other by an index.

    Attributes:
        index: says who lives, and who has what.
    """

    def __init__(self, directory: Path, *, data_connections: bool = True) -> None:
        self._directory = directory
        self._data_connections = data_connections
        self._stack = AsyncExitStack()
        self.index = FakeClusterIndex()  # type: ignore[abstract]
        self.hosts: dict[str, PagesHost] = {}
        self._stores: dict[str, Path] = {}

    async def __aenter__(self) -> Self:
        self._server, self._address = await serve(
            lambda server: index_pb2_grpc.add_IndexServicer_to_server(self.index, server)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for host in self.hosts.values():
            await host.end()
        await self._server.stop(None)
        await self._stack.aclose()

    async def add(self, name: str) -> PagesHost:
        """Start a host; one that was killed has its old store."""
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        if name not in self._stores:
            self._stores[name] = self._stack.enter_context(store_directory())
        host = self.make_host(name, directory, self._stores[name], self._address)
        host.data_connections = self._data_connections
        await host.start()
        self.hosts[name] = host
        self.index.hosts[name] = host.address
        return host

    def make_host(self, name: str, directory: Path, store: Path, index: str) -> PagesHost:
        """Return a new host, not started."""
        return PagesHost(name, directory, store, index)

    async def kill(self, name: str) -> None:
        """End a host's merger as kill -9 does; its lease goes on."""
        await self.hosts.pop(name).end(crash=True)


@asynccontextmanager
async def pages_cluster(
    directory: Path, *names: str, data_connections: bool = True
) -> AsyncIterator[PagesCluster]:
    """A cluster with hosts of these names."""
    async with PagesCluster(directory, data_connections=data_connections) as cluster:
        for name in names:
            await cluster.add(name)
        yield cluster
