"""The device plugin as a service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import grpc
import structlog
from prometheus_client.core import Metric

from samepage.daemon.metrics import counter, gauge
from samepage.daemon.server import Health
from samepage_kubernetes.device_plugin.config import Config
from samepage_kubernetes.device_plugin.kubelet import Registrar
from samepage_kubernetes.device_plugin.plugin import Plugin

log = structlog.get_logger(__name__)


class DevicePluginService:
    """One node's device plugin. Healthy while it is registered, with the device or without."""

    name = "device-plugin"
    reflection = False
    tls_files = None
    health_listen = ""

    def __init__(self, config: Config) -> None:
        # Health is all that there is to serve, so the probes' address is the only one.
        self.listen = (config.health_listen,)
        self.drain_seconds = config.drain_seconds
        self.ready_file: Path | None = config.ready_file
        self.metrics_listen = config.metrics_listen
        self.health = Health([])
        self._plugin = Plugin(config.device, config.seen, config.count)
        self._registrar = Registrar(
            self._plugin,
            config.kubelet_dir,
            config.endpoint,
            config.resource,
            config.check_seconds,
            self._registered,
        )
        self._loop: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Nothing: the plugin has a server of its own, which is made anew with each kubelet."""

    async def start(self) -> None:
        """Begin to look for a kubelet."""
        self._registered(False)
        self._loop = asyncio.create_task(self._registrar.run_forever())
        self._loop.add_done_callback(self._ended)

    async def metrics(self) -> Iterable[Metric]:
        """What was registered and given out."""
        return [
            gauge(
                "samepage_device_plugin_device",
                "Whether the node has the device: 1 or 0.",
                float(self._plugin.healthy),
            ),
            counter(
                "samepage_device_plugin_registrations",
                "Registrations with a kubelet; each restart of the kubelet takes one.",
                self._registrar.registrations,
            ),
            counter(
                "samepage_device_plugin_allocations",
                "Containers that were given the device.",
                self._plugin.allocations,
            ),
        ]

    async def drain(self) -> None:
        """Leave the kubelet; containers keep their devices."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})

    async def close(self) -> None:
        """As `drain`."""
        await self.drain()

    def _registered(self, registered: bool) -> None:
        self.health.set("kubelet", registered)

    def _ended(self, loop: asyncio.Task[None]) -> None:
        if not loop.cancelled():
            log.critical("the plugin ended", exc_info=loop.exception())
            self.health.set("plugin", False)
