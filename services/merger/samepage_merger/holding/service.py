"""`samepage-arenas` as a service: what it is made of, and in which order it starts and ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import grpc
from prometheus_client.core import Metric

import samepage
from samepage.daemon.addresses import UNIX
from samepage.daemon.server import Health
from samepage.v1 import arenas_pb2, arenas_pb2_grpc
from samepage_merger.holding import metrics
from samepage_merger.holding.config import Config
from samepage_merger.holding.held import HeldArenas, Limits
from samepage_merger.holding.servicer import ArenasServicer


class ArenasService:
    """One host's helper. Healthy as long as it runs: arenas outlive the merger and the scanner."""

    name = "arenas"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._held: HeldArenas | None = None
        self.listen = (config.listen, f"{UNIX}{config.socket_path}")
        self.health = Health([arenas_pb2.DESCRIPTOR.services_by_name["Arenas"].full_name])
        self.drain_seconds = config.drain_seconds
        self.ready_file: Path | None = config.ready_file
        self.reflection = config.reflection
        self.metrics_listen = config.metrics_listen
        self.tls_files = config.tls_files
        self.health_listen = config.health_listen

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer; `start` comes first."""
        assert self._held is not None
        servicer = ArenasServicer(self._config.node_name, self._held, self._config.idle_seconds)
        arenas_pb2_grpc.add_ArenasServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Connect to the host's daemons.

        Raises:
            NotRunningError, ServiceUnavailableError, ProtocolVersionError: no merger that this
                process can use.
        """
        config = self._config
        node = await asyncio.to_thread(samepage.connect, config.dir)
        limits = Limits(config.limit_bytes, config.arenas_max, config.streams_max)
        self._held = HeldArenas(node, limits)

    async def metrics(self) -> Iterable[Metric]:
        """What is held; `start` comes first."""
        assert self._held is not None
        return metrics.collect(self._held)

    async def drain(self) -> None:
        """Nothing to end: calls in flight have their time."""

    async def close(self) -> None:
        """End the arenas, and the connection."""
        if self._held is not None:
            await self._held.close()
