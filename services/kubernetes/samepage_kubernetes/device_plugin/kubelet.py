"""Keeps the plugin registered with a kubelet that comes and goes.

A kubelet that starts deletes every socket in its directory, makes its own anew and has forgotten
all plugins. So a restart shows in two ways, and either will do: the plugin's socket is gone, or
the kubelet's is another file than the one that was registered with. Then the plugin listens anew
and registers anew. Containers keep the devices that they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import structlog

from samepage.daemon.addresses import UNIX
from samepage.daemon.server import listen_on
from samepage.errors import SamepageError
from samepage.kubelet import device_plugin_pb2, device_plugin_pb2_grpc
from samepage_kubernetes.device_plugin.plugin import Plugin

KUBELET_SOCKET = "kubelet.sock"
API_VERSION = "v1beta1"

_REGISTER_SECONDS = 10.0
_LOG_AGAIN_SECONDS = 60.0

log = structlog.get_logger(__name__)


class KubeletAwayError(SamepageError):
    """No kubelet answers, or it does not take the plugin."""


class Registrar:
    """Serves the plugin where the kubelet looks for it.

    Args:
        plugin: what to serve.
        directory: the kubelet's, for device plugins.
        endpoint: the file name of the plugin's socket in it.
        resource: what the plugin offers.
        check_seconds: how often to look.
        changed: told whether the plugin is registered, whenever that changes.
    """

    def __init__(
        self,
        plugin: Plugin,
        directory: Path,
        endpoint: str,
        resource: str,
        check_seconds: float,
        changed: Callable[[bool], None],
    ) -> None:
        self._plugin = plugin
        self._socket = directory / endpoint
        self._kubelet = directory / KUBELET_SOCKET
        self._resource = resource
        self._check_seconds = check_seconds
        self._changed = changed
        self._complained = -_LOG_AGAIN_SECONDS
        self.registrations = 0

    async def run_forever(self) -> None:
        """Register, and again after each restart of the kubelet, until cancelled."""
        while True:
            try:
                async with self._served():
                    await self._stay_registered()
            except SamepageError as error:
                self._complain(error)
            finally:
                self._changed(False)
            self._plugin.look()
            await asyncio.sleep(self._check_seconds)

    @contextlib.asynccontextmanager
    async def _served(self) -> AsyncIterator[None]:
        """Listen on the plugin's socket."""
        server = grpc.aio.server()
        device_plugin_pb2_grpc.add_DevicePluginServicer_to_server(self._plugin, server)
        self._socket.unlink(missing_ok=True)
        listen_on(server, f"{UNIX}{self._socket}")
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)

    async def _stay_registered(self) -> None:
        """Register, and return when the kubelet has restarted."""
        kubelet, socket = _identity(self._kubelet), _identity(self._socket)
        if kubelet is None:
            raise KubeletAwayError(f"{self._kubelet} is not there: is kubelet_dir right?")
        await self._register()
        self._changed(True)
        self.registrations += 1
        self._complained = -_LOG_AGAIN_SECONDS
        log.info("registered", resource=self._resource, kubelet=str(self._kubelet))
        while (_identity(self._kubelet), _identity(self._socket)) == (kubelet, socket):
            await asyncio.sleep(self._check_seconds)
            self._plugin.look()
        log.info("the kubelet has gone or restarted", kubelet=str(self._kubelet))

    async def _register(self) -> None:
        request = device_plugin_pb2.RegisterRequest(
            version=API_VERSION, endpoint=self._socket.name, resource_name=self._resource
        )
        try:
            async with grpc.aio.insecure_channel(f"{UNIX}{self._kubelet}") as channel:
                stub = device_plugin_pb2_grpc.RegistrationStub(channel)
                await stub.Register(request, timeout=_REGISTER_SECONDS)
        except grpc.aio.AioRpcError as error:
            why = error.details() or error.code().name
            raise KubeletAwayError(f"the kubelet did not take the plugin: {why}") from error

    def _complain(self, error: SamepageError) -> None:
        """Say why there is no plugin, but not each second."""
        now = time.monotonic()
        if now - self._complained >= _LOG_AGAIN_SECONDS:
            self._complained = now
            log.warning("not registered", resource=self._resource, why=str(error))


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from the next of its name."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
