"""The index as a process: what it starts, watches and stops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from pathlib import Path

import grpc
import structlog
from prometheus_client.core import Metric

from samepage.daemon import tasks
from samepage.daemon.server import Health
from samepage.daemon.tls import TlsFiles
from samepage.v1 import index_pb2, index_pb2_grpc
from samepage_index.config import SECTION, IndexConfig
from samepage_index.embedded import EmbeddedServer
from samepage_index.entries import Entries
from samepage_index.errors import StoreUnavailableError
from samepage_index.hosts import Hosts
from samepage_index.index import Index
from samepage_index.janitor import Janitor
from samepage_index.metrics import IndexMetrics
from samepage_index.servicer import IndexServicer
from samepage_index.store import ServerInfo, Store, Tls, read_password

_CHECK_SECONDS = 0.5
_FULL_NAME = index_pb2.DESCRIPTOR.services_by_name["Index"].full_name

log = structlog.get_logger(__name__)


class IndexService:
    """What `samepage.daemon.server.run` serves."""

    name = SECTION

    def __init__(self, config: IndexConfig) -> None:
        self._config = config
        self.health = Health([_FULL_NAME])
        self._embedded = None if config.redis_url else EmbeddedServer(config.data_dir)
        self._store = self._make_store()
        self._server = ServerInfo("redis", "?")
        hosts = Hosts(self._store, config.key_prefix, config.lease_ms)
        entries = Entries(self._store, config.key_prefix)
        self._janitor = Janitor(hosts, entries, config.sweep_ms, config.lease_seconds)
        index = Index(hosts, entries, self._describe_store)
        self._servicer = IndexServicer(index, config.lease_ms)
        self._metrics = IndexMetrics(index, self._servicer)
        self._loops: list[asyncio.Task[None]] = []

    @property
    def listen(self) -> list[str]:
        return self._config.addresses

    @property
    def drain_seconds(self) -> float:
        return self._config.drain_seconds

    @property
    def ready_file(self) -> Path | None:
        return self._config.ready_file

    @property
    def reflection(self) -> bool:
        return self._config.reflection

    @property
    def metrics_listen(self) -> str:
        return self._config.metrics_listen

    @property
    def tls_files(self) -> TlsFiles | None:
        return self._config.tls_files

    @property
    def health_listen(self) -> str:
        return self._config.health_listen

    @property
    def embedded_pid(self) -> int:
        """Process id of the index's own server, 0 without one."""
        return self._embedded.pid if self._embedded is not None else 0

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        index_pb2_grpc.add_IndexServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Reach Redis, or start one.

        Raises:
            StoreUnavailableError: it cannot be used; the text says why.
            ConfigError: a path does not do.
        """
        if self._embedded is not None:
            await self._embedded.start()
        self._server = await self._store.check()
        self.health.set("redis", True)
        log.info("using Redis", store=self._describe_store())
        self._loop(self._check_forever())
        self._loop(self._janitor.run_forever())

    async def metrics(self) -> Iterable[Metric]:
        """What the index and its Redis say."""
        return await self._metrics.collect()

    async def drain(self) -> None:
        """End the streams; scanners go to another index, or wait for the next."""
        self._servicer.drain()

    async def close(self) -> None:
        """Let go of Redis, and stop the embedded one."""
        await tasks.end(self._loops)
        await self._store.close()
        if self._embedded is not None:
            await self._embedded.stop()

    def _make_store(self) -> Store:
        config = self._config
        if self._embedded is not None:
            return Store(self._embedded.url, timeout=config.redis_timeout_seconds)
        file = config.redis_password_file
        password = read_password(file) if file is not None else None
        tls = Tls(config.redis_ca_file, config.redis_cert_file, config.redis_key_file)
        return Store(
            config.redis_url, password, config.redis_timeout_seconds, tls, config.key_prefix
        )

    def _describe_store(self) -> str:
        place = "(embedded)" if self._embedded is not None else f"at {self._store.place}"
        if self._server.primaries:
            place += f", a cluster of {self._server.primaries} primaries"
        return f"{self._server.kind} {self._server.version} {place}"

    def _loop(self, body: Coroutine[None, None, None]) -> None:
        self._loops.append(asyncio.create_task(body))

    async def _check_forever(self) -> None:
        """Tell health whether Redis is there."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                self._server = await self._store.check()
            except StoreUnavailableError as error:
                if self.health.serving:
                    log.error("Redis cannot be used", error=str(error))
                self.health.set("redis", False)
            else:
                self.health.set("redis", True)
