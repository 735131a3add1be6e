"""The merger as a service: what it is made of, and in which order it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import resource
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import grpc
import structlog
from prometheus_client.core import Metric

from samepage.daemon import heap
from samepage.daemon.addresses import UNIX
from samepage.daemon.config import ConfigError
from samepage.daemon.identity import Identity, make_identity
from samepage.daemon.identity import metrics as identity_metrics
from samepage.daemon.peers import PeerServer
from samepage.daemon.policies import Policies
from samepage.daemon.secrets import read_secret
from samepage.daemon.server import Health
from samepage.daemon.tls import Tls
from samepage.v1 import merger_pb2, merger_pb2_grpc, pages_pb2
from samepage_merger import metrics
from samepage_merger.accounts import Accountant
from samepage_merger.agents import WINDOW_BYTES, Agents
from samepage_merger.cluster import landing
from samepage_merger.cluster import metrics as cluster_metrics
from samepage_merger.cluster.answering import Answers
from samepage_merger.cluster.clone import Clones, Services
from samepage_merger.cluster.data_server import DataServer
from samepage_merger.cluster.elsewhere import Elsewhere
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.handover import HandOvers
from samepage_merger.cluster.hosts import Hosts
from samepage_merger.cluster.journal import Journal
from samepage_merger.cluster.letting_go import let_go
from samepage_merger.cluster.local import Local
from samepage_merger.cluster.locator import Locator
from samepage_merger.cluster.pages import PagesServicer
from samepage_merger.cluster.promoting import Promoter
from samepage_merger.cluster.snapshots import Snapshots
from samepage_merger.config import Config
from samepage_merger.domains import Domains
from samepage_merger.headroom import Headroom
from samepage_merger.janitor import Janitor
from samepage_merger.mappings import MappingBudget
from samepage_merger.memory import HostMemory
from samepage_merger.merging import MergeEngine
from samepage_merger.orders import Orders
from samepage_merger.pairs import Tools
from samepage_merger.servicer import MergerServicer
from samepage_merger.sharers import Overflow
from samepage_merger.store import StoreDirectory
from samepage_merger.unsharing import Unsharer

AGENT_SOCKET = "merger.sock"
API_SOCKET = "merger-api.sock"

_USERFAULTFD = "/dev/userfaultfd"

log = structlog.get_logger(__name__)


class MergerService:
    """One host's merger."""

    name = "merger"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._resources = contextlib.ExitStack()
        self._servicer: MergerServicer | None = None
        self._pages: PagesServicer | None = None
        self._data_server: DataServer | None = None
        self._locator: Locator | None = None
        self._hosts: Hosts | None = None
        self._clones: Clones | None = None
        self._handovers: HandOvers | None = None
        self._elsewhere: Elsewhere | None = None
        self._let_go: Callable[[], Awaitable[None]] | None = None
        self._collect: Callable[[], Iterable[Metric]] | None = None
        self._janitor: asyncio.Task[None] | None = None
        self._identity: Identity | None = None
        self.listen = (config.listen, f"{UNIX}{config.dir / API_SOCKET}")
        self.health = Health(
            [
                merger_pb2.DESCRIPTOR.services_by_name["Merger"].full_name,
                pages_pb2.DESCRIPTOR.services_by_name["Pages"].full_name,
            ]
        )
        self.drain_seconds = config.drain_seconds
        self.ready_file: Path | None = config.ready_file
        self.reflection = config.reflection
        self.metrics_listen = config.metrics_listen
        self.tls_files = config.tls_files
        self.health_listen = config.health_listen

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers; `start` comes first."""
        assert self._servicer is not None and self._pages is not None
        self._pages.register(server)
        merger_pb2_grpc.add_MergerServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Open the store, and listen to agents.

        Raises:
            ConfigError: the secret, the policy of identities or the socket directory will not do.
            StoreError: the store's directory will not do.
            ListenError: data connections cannot be taken.
        """
        config = self._config
        _allow_many_agents()
        heap.keep()
        secret = read_secret(config.secret_file)
        stores = StoreDirectory(
            config.store_path, config.store_readonly_dir, config.store_limit_bytes
        )
        domains = Domains(stores, secret)
        self._resources.callback(domains.close)
        janitor = Janitor(domains)
        self._identity = make_identity(config)
        agents = Agents(domains, janitor.wake, identity=self._identity)
        policies = Policies(config)
        policies.follow(lambda: stores.limit(policies.current.store_limit_bytes))
        headroom = Headroom(policies, domains.saved_pages, HostMemory().available)
        orders = Orders(config.order_timeout_seconds, lambda: policies.current.sharers_max)
        mappings = MappingBudget(policies, orders)
        engine = MergeEngine(agents.find, Tools(orders, headroom, mappings, Overflow(orders)))
        tls = Tls.of(config.tls_files)
        self._locator = Locator(config.scanner_target, agents.find, tls)
        self._hosts = Hosts(config.node_name, config.index, tls)
        fetcher = Fetcher(self._hosts)
        promoter = Promoter(orders)
        local = Local(self._locator, promoter)
        snapshots = Snapshots(domains, orders, promoter, local, fetcher)
        answers = Answers(domains, local, snapshots)
        self._pages = PagesServicer(domains, local, snapshots, answers)
        self._data_server = DataServer(answers, tls)
        if config.data_address:
            self._pages.data_port = await self._data_server.start(config.data_address)
        self._elsewhere = Elsewhere(
            policies, domains, agents.find, orders, self._hosts, fetcher, secret
        )
        agents.requests = self._elsewhere
        self._pages.keeper = self._elsewhere.keeper
        self._let_go = functools.partial(let_go, domains, self._hosts)
        journal = Journal(config.store_path)
        self._handovers = HandOvers(self._hosts, journal, domains)
        agents.clones = self._clones = Clones(
            Services(
                config.node_name,
                self._hosts,
                landing.Tools(orders, headroom, mappings, local, fetcher),
                domains,
                journal,
                config.hold_lease_seconds,
                exempt=self._elsewhere.keeper.exempt,
                granted=self._elsewhere.grants.add,
            ),
            self._handovers,
        )
        self._handovers.start()
        self._servicer = MergerServicer(
            config.node_name,
            domains,
            agents,
            engine,
            Unsharer(domains, orders),
            Accountant(config.node_name, domains, orders),
            headroom,
            policies,
            self._elsewhere,
            self._handovers,
        )
        hosts, elsewhere = self._hosts, self._elsewhere
        identity = self._identity
        self._collect = lambda: (
            *metrics.collect(domains, stores, agents, engine),
            *metrics.collect_cluster(domains, hosts, fetcher, answers),
            *cluster_metrics.collect(elsewhere),
            *identity_metrics.collect(identity),
        )
        self._start_peers(agents)
        self._elsewhere.start()
        self._janitor = asyncio.ensure_future(janitor.run_forever())
        self._janitor.add_done_callback(self._janitor_ended)
        # What is there now lives as long as the process: no collection needs to look at it.
        gc.freeze()

    async def metrics(self) -> Iterable[Metric]:
        """What the books and the agents say; `start` comes first."""
        assert self._collect is not None
        return self._collect()

    async def retire(self, seconds: float) -> None:
        """Release what others hold in vain for this host, and have the owners of what this one
        holds let it go. They fetch it first, which takes a merger that serves."""
        assert self._elsewhere is not None and self._let_go is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._elsewhere.keeper.retire()
                await self._let_go()

    async def drain(self) -> None:
        """End the streams of other mergers; other calls in flight finish their steps."""
        if self._pages is not None:
            self._pages.drain()
        if self._data_server is not None:
            await self._data_server.close()

    async def close(self) -> None:
        """Let go of the agents, and of what no process maps."""
        if self._janitor is not None:
            self._janitor.cancel()
            await asyncio.wait({self._janitor})
        if self._data_server is not None:
            await self._data_server.close()
        if self._clones is not None:
            await self._clones.close()
        if self._handovers is not None:
            await self._handovers.close()
        if self._elsewhere is not None:
            await self._elsewhere.close()
        if self._hosts is not None:
            await self._hosts.close()
        if self._locator is not None:
            await self._locator.close()
        self._resources.close()
        if self._identity is not None:
            await self._identity.close()

    def _janitor_ended(self, janitor: asyncio.Task[None]) -> None:
        if not janitor.cancelled() and (error := janitor.exception()) is not None:
            log.error("the janitor failed: slots are no longer freed", exc_info=error)
            self.health.set("janitor", False)

    def _start_peers(self, agents: Agents) -> None:
        descriptors = []
        try:
            fd = os.open(_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.warning(
                "agents that may not use userfaultfd by themselves can share nothing",
                path=_USERFAULTFD,
                why=error.strerror,
            )
        else:
            self._resources.callback(os.close, fd)
            descriptors.append(fd)
        path = self._config.dir / AGENT_SOCKET
        server = PeerServer(path, agents, WINDOW_BYTES, descriptors, self._identity)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            server.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {path} ({error.strerror}): set dir to a directory that the"
                " merger may write, with a path of less than 90 bytes"
            ) from error
        self._resources.callback(server.stop)


def _allow_many_agents() -> None:
    """Use as many descriptors as this process may: each agent takes two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
