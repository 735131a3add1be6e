"""Runs a service: a grpc.aio server with the standard health service and a graceful stop.

The first SIGINT or SIGTERM drains: health says NOT_SERVING, the service settles what it must with
others, then no new call is accepted, the service ends its streams, and calls in flight get what is
left of `drain_seconds`. The second signal exits at once, with code 130 or 143.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client.core import Metric

from samepage.daemon.addresses import UNIX, check_listen
from samepage.daemon.config import ConfigError
from samepage.daemon.metrics import MetricsServer, common
from samepage.daemon.roles import RoleGuard
from samepage.daemon.tls import Tls, TlsFiles
from samepage.errors import SamepageError

_MESSAGE_BYTES_MAX = 16 << 20
_OPTIONS = (
    # Without this two servers on one port would share its connections silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

log = structlog.get_logger(__name__)


class ListenError(SamepageError):
    """An address cannot be served on: choose another, or end who uses it."""


class Health(health_pb2_grpc.HealthServicer):
    """The standard health service (grpc.health.v1).

    Serving means: started, not draining, and every dependency that was ever `set` is available.

    Args:
        services: full names of the gRPC services that this process offers.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self.services = tuple(services)
        self._dependencies: dict[str, bool] = {}
        self._started = False
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """What the health service answers."""
        return self._started and not self._draining and all(self._dependencies.values())

    def set(self, dependency: str, available: bool) -> None:
        """Say whether something that the service needs is there."""
        if self._dependencies.get(dependency) is available:
            return
        if available and dependency in self._dependencies:
            log.info("dependency is back", dependency=dependency)
        elif not available:
            log.warning("dependency is away", dependency=dependency)
        self._dependencies[dependency] = available
        self._notify()

    def started(self) -> None:
        """The service is ready."""
        self._started = True
        self._notify()

    def drain(self) -> None:
        """NOT_SERVING from now on; watchers are told, and their streams end."""
        self._draining = True
        self._notify()

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes, until the server drains."""
        last: int | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            if self._draining:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        if service and service not in self.services:
            return _SERVICE_UNKNOWN
        return _SERVING if self.serving else _NOT_SERVING

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Service(Protocol):
    """What `run` serves."""

    @property
    def name(self) -> str:
        """Such as "index"."""

    @property
    def listen(self) -> Sequence[str]:
        """Addresses: "127.0.0.1:0" (0: any free port), "unix:/path" (mode 0600)."""

    @property
    def health(self) -> Health:
        """The service sets its dependencies here."""

    @property
    def drain_seconds(self) -> float:
        """How long calls in flight may go on after the first signal."""

    @property
    def ready_file(self) -> Path | None:
        """Gets `{"address": ..., "addresses": [...], "metrics": ..., "health": ..., "pid": ...}`
        when serving."""

    @property
    def metrics_listen(self) -> str:
        """Where metrics are served over HTTP, "127.0.0.1:0" (0: any free port). Empty: nowhere."""

    @property
    def tls_files(self) -> TlsFiles | None:
        """Mutual TLS on all addresses but unix sockets; None for none."""

    @property
    def health_listen(self) -> str:
        """Where health alone is served, without TLS, "127.0.0.1:0". Empty: nowhere."""

    @property
    def reflection(self) -> bool:
        """Whether to offer gRPC's server reflection."""

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers."""

    async def start(self) -> None:
        """Get ready; called before the first call is accepted."""

    async def metrics(self) -> Iterable[Metric]:
        """What there is to tell now, besides what every service has. Called between `start` and
        `close`."""

    async def drain(self) -> None:
        """End streams and loops soon: no new call comes, those in flight still run."""

    async def close(self) -> None:
        """Release everything; no call runs any more. Called also when `start` failed."""


@runtime_checkable
class Retiring(Protocol):
    """A service that has something to settle with others before it stops."""

    async def retire(self, seconds: float) -> None:
        """Settle it within so long; every call is served as before meanwhile."""


@dataclass
class _Stop:
    """Set by the first signal."""

    event: asyncio.Event = field(default_factory=asyncio.Event)

    def signalled(self, number: signal.Signals) -> None:
        if self.event.is_set():
            os._exit(128 + number)
        log.info("stopping", signal=number.name)
        self.event.set()


async def run(service: Service) -> None:
    """Serve until the first SIGINT or SIGTERM, then drain and return.

    Raises:
        ListenError: an address cannot be served on.
        ConfigError: an address or the ready file makes no sense.
        SamepageError: what the service's `start` raises.
    """
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.signalled, number)
    try:
        if await _unless_stopped(service.start(), stop):
            await _serve(service, stop)
    finally:
        await service.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _unless_stopped(start: Any, stop: _Stop) -> bool:
    """Await `start`; False when a signal came first."""
    starting = asyncio.ensure_future(start)
    stopping = asyncio.ensure_future(stop.event.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.wait({starting})
    return False


async def _serve(service: Service, stop: _Stop) -> None:
    tls = Tls.of(service.tls_files)
    guards = [RoleGuard()] if tls is not None else []
    server = grpc.aio.server(options=_OPTIONS, interceptors=guards)
    service.register(server)
    health_pb2_grpc.add_HealthServicer_to_server(service.health, server)
    if service.reflection:
        names = (*service.health.services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    addresses = [listen_on(server, address, tls) for address in service.listen]
    probed = grpc.aio.server(options=_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(service.health, probed)
    health = listen_on(probed, service.health_listen) if service.health_listen else ""

    async def collect() -> Iterable[Metric]:
        return [*common(service.name, service.health.serving), *await service.metrics()]

    exporter = MetricsServer(collect)
    metrics = await _export(exporter, service.metrics_listen)
    await server.start()
    await probed.start()
    try:
        service.health.started()
        if service.ready_file is not None:
            write_ready_file(service.ready_file, addresses, metrics, health)
        log.info(
            "serving",
            addresses=addresses,
            metrics=metrics,
            health=health,
            tls=tls is not None,
            pid=os.getpid(),
        )
        await stop.event.wait()
    finally:
        await _drain(service, server)
        await probed.stop(None)
        await exporter.stop()


async def _export(exporter: MetricsServer, listen: str) -> str:
    """Serve metrics, if that is wanted; returns the address."""
    if not listen:
        return ""
    try:
        return await exporter.start(listen)
    except OSError as error:
        raise ListenError(
            f"cannot serve metrics on {listen} ({error.strerror}): set metrics_listen to another "
            "address, or to nothing"
        ) from error


async def _drain(service: Service, server: grpc.aio.Server) -> None:
    service.health.drain()
    if service.ready_file is not None:
        service.ready_file.unlink(missing_ok=True)
    deadline = time.monotonic() + service.drain_seconds
    if isinstance(service, Retiring):
        await service.retire(service.drain_seconds / 2)
    left = max(0.0, deadline - time.monotonic())
    stopping = asyncio.ensure_future(server.stop(left))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(left):
            await service.drain()
    await stopping
    log.info("stopped")


def write_ready_file(
    path: Path, addresses: Sequence[str], metrics: str = "", health: str = ""
) -> None:
    """Tell whoever started this process that it serves. The file appears whole, or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    tcp = [address for address in addresses if not address.startswith(UNIX)]
    ready = {
        "address": (tcp or addresses)[0],
        "addresses": [*addresses],
        "metrics": metrics,
        "health": health,
        "pid": os.getpid(),
    }
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(ready) + "\n")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write the ready file {path}: {error.strerror}") from error


def listen_on(server: grpc.aio.Server, address: str, tls: Tls | None = None) -> str:
    """Bind, and return the address with the port that it got. Unix sockets go without TLS.

    Raises:
        ListenError: it cannot be served on.
    """
    check_listen(address)
    is_unix = address.startswith(UNIX)
    # Only the service's own user may connect to a unix socket; the mode must hold from bind() on.
    old_mask = os.umask(0o177) if is_unix else None
    try:
        if tls is None or is_unix:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as error:
        raise ListenError(
            f"cannot listen on {address}: the address is in use, not of this machine, or not "
            "permitted; choose another one or end the process that uses it"
        ) from error
    finally:
        if old_mask is not None:
            os.umask(old_mask)
    return address if is_unix else f"{address.rpartition(':')[0]}:{port}"
