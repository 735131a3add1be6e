"""The scanner as a service: what there is, and who tells whom."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from pathlib import Path

import grpc
import structlog
from prometheus_client.core import Metric

from samepage.daemon.config import ConfigError
from samepage.daemon.identity import make_identity
from samepage.daemon.identity import metrics as identity_metrics
from samepage.daemon.peers import PeerServer
from samepage.daemon.policies import Policies
from samepage.daemon.secrets import read_secret
from samepage.daemon.server import Health
from samepage.daemon.tls import Tls
from samepage.v1 import scanner_pb2_grpc
from samepage_scanner import metrics
from samepage_scanner.books import Books
from samepage_scanner.channel import Channel
from samepage_scanner.config import Config
from samepage_scanner.merging import MergerClient
from samepage_scanner.passes import Passes
from samepage_scanner.publisher import Publisher
from samepage_scanner.servicer import ScannerServicer
from samepage_scanner.turns import WINDOW_BYTES

SOCKET = "scanner.sock"

_INDEX_SECONDS = 2.0

log = structlog.get_logger(__name__)


class ScannerService:
    """See samepage.daemon.server.Service. Build it inside the event loop.

    Raises:
        ConfigError: the secret, the policy of identities or a certificate cannot be read.
    """

    name = "scanner"

    def __init__(self, config: Config) -> None:
        self._config = config
        self.policies = Policies(config)
        self.health = Health(["samepage.v1.Scanner"])
        self.listen = config.addresses
        self.drain_seconds = config.drain_seconds
        self.ready_file: Path | None = config.ready_file
        self.reflection = config.reflection
        self.metrics_listen = config.metrics_listen
        self.tls_files = config.tls_files
        self.health_listen = config.health_listen
        self._tls = Tls.of(config.tls_files)
        self.books = Books(read_secret(config.secret_file), config.pages_max)
        self.merger = MergerClient(
            config.merger_target, config.merger_seconds, self._merger_changed, self._tls
        )
        self.publisher = self._make_publisher() if config.index else None
        self.passes = Passes(self.policies, self.books, self.merger, self._passed)
        self.policies.follow(self.passes.hasten)
        self._identity = make_identity(config)
        channel = Channel(self.books, self.passes, self.passes.hasten, self._identity)
        self._peers = PeerServer(
            config.dir / SOCKET, channel, WINDOW_BYTES, identity=self._identity
        )
        self._loops: list[asyncio.Task[None]] = []

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        servicer = ScannerServicer(
            self._config.node_name,
            self.books,
            self.passes,
            self.merger,
            self.publisher,
            self.policies,
        )
        scanner_pb2_grpc.add_ScannerServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Listen for agents, begin the loops, and give the index a moment to take this host.

        Raises:
            ConfigError: there can be no socket in `dir`.
        """
        self.health.set("merger", False)
        try:
            self._peers.start()
        except OSError as error:
            raise ConfigError(
                f"cannot make {self._peers.path}: {error.strerror}; create the directory, "
                "or set `dir` to one that this user may write"
            ) from error
        self._begin("passes", self.passes.run_forever())
        self._begin("merger watch", self.merger.watch())
        if self.publisher is not None:
            self._begin("publisher", self.publisher.run_forever())
            # Whoever sees this daemon serve expects the other hosts to find this one.
            await self.publisher.asked(_INDEX_SECONDS)

    async def metrics(self) -> Iterable[Metric]:
        """What the books and the passes say."""
        return (
            *metrics.collect(self.books, self.passes, self.merger, self.publisher, self.policies),
            *identity_metrics.collect(self._identity),
        )

    async def drain(self) -> None:
        """End the loops: shares that wait are refused."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def close(self) -> None:
        """Drop the agents and let go of the merger."""
        await self.drain()
        self._peers.stop()
        await self.merger.close()
        await self._identity.close()

    def _make_publisher(self) -> Publisher:
        return Publisher(
            self.books,
            self._config.index,
            self._config.node_name,
            self._config.merger_address,
            self.policies,
            self._index_changed,
            self._tls,
        )

    def _begin(self, name: str, loop: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(loop, name=name)
        task.add_done_callback(self._ended)
        self._loops.append(task)

    def _ended(self, loop: asyncio.Task[None]) -> None:
        """A loop ends by being cancelled; anything else is a bug, and shows in the health."""
        if not loop.cancelled():
            log.critical("a loop ended", loop=loop.get_name(), exc_info=loop.exception())
            self.health.set(loop.get_name(), False)

    def _passed(self) -> None:
        if self.publisher is not None:
            self.publisher.notify()

    def _merger_changed(self, connected: bool) -> None:
        self.health.set("merger", connected)

    def _index_changed(self, connected: bool) -> None:
        # No dependency: sharing on this host goes on without an index.
        log.info("index is there" if connected else "index is away", target=self._config.index)
