"""A merger without its gRPC API, in the test's own event loop, on a store of its own."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent

from samepage.daemon.identity import Identity
from samepage.daemon.peers import PeerServer
from samepage.daemon.policies import Policies
from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.accounts import Accountant
from samepage_merger.agents import WINDOW_BYTES, Agents
from samepage_merger.cluster.promoting import Promoter
from samepage_merger.config import Config
from samepage_merger.domains import Domain, Domains
from samepage_merger.headroom import Headroom
from samepage_merger.janitor import Janitor
from samepage_merger.mappings import MappingBudget
from samepage_merger.merging import RUN, ZERO_LEADER, MergeEngine
from samepage_merger.orders import Orders
from samepage_merger.pairs import OUTCOMES, Tools
from samepage_merger.sharers import Overflow
from samepage_merger.store import StoreDirectory
from samepage_merger.unsharing import Unsharer
from samepage_merger.view import StoreError

SECRET = b"the secret of a test's cluster"
DOMAIN = "default"
ZEROS = ZERO_LEADER


@contextmanager
def store_directory() -> Iterator[Path]:
    """A directory on a tmpfs for a store, removed afterwards."""
    parent = Path(tempfile.mkdtemp(prefix="samepage-test-", dir="/dev/shm"))
    try:
        yield parent / "store"
    finally:
        shutil.rmtree(parent)


def open_directory(
    path: Path, readonly_dir: Path | None = None, limit_bytes: int = 0
) -> StoreDirectory:
    """Open a store's directory, or skip the test where mounts are not permitted."""
    try:
        return StoreDirectory(path, readonly_dir, limit_bytes)
    except StoreError as error:
        if "CAP_SYS_ADMIN" not in str(error):
            raise
        pytest.skip(f"needs root: {error}")


class MergerHost:
    """The merger's parts, put together."""

    def __init__(
        self,
        directory: Path,
        store: Path,
        *,
        timeout: float = 5.0,
        limit_bytes: int = 0,
        config: Config | None = None,
        available: Callable[[], int] = lambda: 1 << 40,
        identity: Identity | None = None,
    ) -> None:
        self.path = directory / "merger.sock"
        self.stores = open_directory(store, limit_bytes=limit_bytes)
        self.domains = Domains(self.stores, SECRET)
        self.janitor = Janitor(self.domains)
        self.agents = Agents(self.domains, self.janitor.wake, identity=identity)
        self.policies = Policies(config or Config(node="test"))
        self.headroom = Headroom(self.policies, self.domains.saved_pages, available)
        self.orders = Orders(timeout, lambda: self.policies.current.sharers_max)
        tools = Tools(
            self.orders,
            self.headroom,
            MappingBudget(self.policies, self.orders),
            Overflow(self.orders),
        )
        self.engine = MergeEngine(self.agents.find, tools)
        self.unsharer = Unsharer(self.domains, self.orders)
        self.accountant = Accountant("host-a", self.domains, self.orders)
        self.promoter = Promoter(self.orders)
        self._server = PeerServer(self.path, self.agents, WINDOW_BYTES, identity=identity)
        self._server.start()
        self._ended = False

    @property
    def domain(self) -> Domain:
        """The domain that most tests use."""
        return self.domains.open(DOMAIN)

    def crash(self) -> None:
        """End as kill -9 ends it: descriptors are closed, nothing is cleaned up."""
        self._ended = True
        self._server.stop()
        self.stores.close()

    def stop(self) -> None:
        """End in order, unless it crashed."""
        if not self._ended:
            self._server.stop()
            self.domains.close()

    async def merge(
        self,
        arenas: list[FakeArena],
        runs: Iterable[tuple[int, int, int, int, int]],
        domain: str = DOMAIN,
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Merge runs (leader, follower, leader page, follower page, count); return outcomes."""
        keys = [(arena.owner.agent, arena.number) for arena in arenas]
        records = np.array(list(runs), RUN)
        outcomes = np.zeros((len(arenas), OUTCOMES), np.int64)
        done = 0
        async for progress in self.engine.merge(domain, keys, records.tobytes()):
            outcomes += progress.outcomes
            done += progress.pages_done
        assert done == records["count"].sum()
        return outcomes

    async def merge_all(
        self, *arenas: FakeArena
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Merge every page of the first arena with the same page of each other."""
        pages = arenas[0].pages
        runs = [(0, follower, 0, 0, pages) for follower in range(1, len(arenas))]
        return await self.merge(list(arenas), runs)

    async def settled(self) -> None:
        """Wait until the janitor has nothing left to wait for."""
        async with asyncio.timeout(10):
            while not self.janitor.run_once():
                await asyncio.sleep(0.01)

    def assert_exact(self, *agents: FakeMergingAgent) -> None:
        """The books are what the agents' pages map, and the store holds nothing else."""
        by_domain: dict[str, list[FakeArena]] = {}
        for agent in agents:
            for arena in agent.arenas.values():
                by_domain.setdefault(arena.domain, []).append(arena)
        for domain in self.domains:
            arenas = by_domain.get(domain.name, [])
            mapped = [arena.slots[arena.slots != 0] for arena in arenas]
            slots, references = np.unique(
                np.concatenate([np.empty(0, np.int64), *mapped]), return_counts=True
            )
            table = domain.books.table
            assert table.live().tolist() == slots.tolist()
            assert table.references(slots).tolist() == references.tolist()
            assert table.total_references() == domain.books.shared_pages() == references.sum()
            assert domain.store.resident_bytes() == slots.size * PAGE_SIZE
