"""A service's Prometheus metrics: how they are made, and how they are served.

They are read from the live objects when somebody asks, in the event loop, which owns those: no
path pays for them, and no lock is needed. That is why prometheus_client's own server, which has a
thread, does not do here. HTTP itself is h11's; what is left is one answer a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TypeVar

import h11
import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from samepage.daemon import logs
from samepage.daemon.addresses import host_and_port
from samepage.daemon.config import ConfigError

PATH = "/metrics"

Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)

_CONNECTIONS_MAX = 16
_HEAD_BYTES_MAX = 16384
_READ_BYTES = 4096
_PATIENCE_SECONDS = 10.0

log = structlog.get_logger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]


def counter(
    name: str, text: str, value: float | Mapping[str, float], label: str = ""
) -> CounterMetricFamily:
    """Return a counter; by values of a label when `value` is a mapping. `name` lacks "_total"."""
    return _fill(CounterMetricFamily(name, text, labels=[label] if label else []), value)


def gauge(
    name: str, text: str, value: float | Mapping[str, float], label: str = ""
) -> GaugeMetricFamily:
    """Return a gauge; by values of a label when `value` is a mapping."""
    return _fill(GaugeMetricFamily(name, text, labels=[label] if label else []), value)


def histogram(
    name: str, text: str, bounds: Sequence[float], counts: Sequence[int]
) -> HistogramMetricFamily:
    """Return a histogram of counts below each bound, and a last one of all that is above.

    Nobody knows the sum of what was observed, so there is none.
    """
    buckets = []
    below = 0
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(name, text, buckets=buckets)


def _fill(family: Family, value: float | Mapping[str, float]) -> Family:
    values = value.items() if isinstance(value, Mapping) else (("", value),)
    for label, number in values:
        family.add_metric([label] if label else [], number)
    return family


def common(service: str, serving: bool) -> Iterable[Metric]:
    """Return what every service has: about its process, its health and its log."""
    yield gauge("samepage_serving", "Whether the service is healthy: 1 or 0.", float(serving))
    build = GaugeMetricFamily(
        "samepage_build_info", "Always 1; says which service it is.", labels=["service", "version"]
    )
    build.add_metric([service, version("samepage")], 1)
    yield build
    yield counter(
        "samepage_log_messages",
        "Lines logged, by level; those below log_level are not counted.",
        {level: logs.counts[level] for level in ("warning", "error", "critical")},
        "level",
    )
    yield from ProcessCollector(registry=None).collect()


def check_metrics_listen(address: str) -> None:
    """Check the setting metrics_listen: "host:port", or empty for no metrics.

    Raises:
        ConfigError: it is neither.
    """
    if address:
        split_address(address)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[host]:port".

    Raises:
        ConfigError: it is no such address.
    """
    host, port = host_and_port(address)
    if not (host and "/" not in host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(
            f"metrics_listen must be host:port (port 0: any free one), or empty; not {address!r}"
        )
    return host, int(port)


class MetricsServer:
    """Answers GET /metrics.

    Args:
        collect: makes the metrics.
    """

    def __init__(self, collect: Callable[[], Awaitable[Iterable[Metric]]]) -> None:
        self._collect = collect
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, listen: str) -> str:
        """Serve on "host:port"; returns the address with the port that it got.

        Raises:
            OSError: the address is in use, not of this machine, or not permitted.
        """
        host, port = split_address(listen)
        self._server = await asyncio.start_server(self._connected, host, port)
        port = self._server.sockets[0].getsockname()[1]
        return f"{listen.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """End at once; whoever is being answered is cut off."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        crowded = len(self._connections) >= _CONNECTIONS_MAX
        connection = asyncio.create_task(self._converse(reader, writer, crowded))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, crowded: bool
    ) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._serve(reader, writer, crowded)
                # Closing with bytes unread would take the answer away from the client.
                writer.write_eof()
                while await reader.read(_READ_BYTES):
                    continue
        except (OSError, TimeoutError, h11.ProtocolError):
            log.debug("a scrape broke off")
        finally:
            writer.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, crowded: bool
    ) -> None:
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES_MAX)
        try:
            request = await _receive(protocol, reader)
        except h11.RemoteProtocolError as error:
            answer = _Answer(error.error_status_hint, f"{error}\n")
        else:
            if request is None:
                return
            answer = _Answer(503, "busy\n") if crowded else await self._answer(request)
        await _send(protocol, writer, answer)

    async def _answer(self, request: h11.Request) -> _Answer:
        if request.method not in (b"GET", b"HEAD"):
            return _Answer(405, "only GET and HEAD\n", headers=(("Allow", "GET, HEAD"),))
        if request.target.partition(b"?")[0] != PATH.encode():
            return _Answer(404, f"metrics are at {PATH}\n")
        accepted = b",".join(value for name, value in request.headers if name == b"accept")
        try:
            encode, kind = choose_encoder(accepted.decode("latin-1"))
        except (TypeError, ValueError):
            # A version that is no number.
            encode, kind = choose_encoder("")
        try:
            registry = _Collected(await self._collect())
            body = encode(registry)
        except Exception:
            log.exception("cannot collect metrics")
            return _Answer(500, "the metrics cannot be collected: see the service's log\n")
        return _Answer(200, body, kind)


class _Answer:
    """Status, body and headers."""

    def __init__(
        self,
        status: int,
        body: bytes | str,
        kind: str = "text/plain; charset=utf-8",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.status = status
        self.body = body.encode() if isinstance(body, str) else body
        self.headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(self.body))),
            ("Connection", "close"),
            *headers,
        ]


class _Collected(CollectorRegistry):
    """Metrics in the form that encoders take."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        super().__init__()
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


async def _receive(protocol: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Return the request's head; None when nobody asks anything."""
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


async def _send(protocol: h11.Connection, writer: asyncio.StreamWriter, answer: _Answer) -> None:
    response = h11.Response(status_code=answer.status, headers=answer.headers)
    for event in (response, h11.Data(data=answer.body), h11.EndOfMessage()):
        writer.write(protocol.send(event) or b"")
    await writer.drain()
