"""The ways to fetch pages from one host: data connections, and gRPC where there are none.

Theory. A stream carries one request at a time, and belongs to whoever waits for its answer; when
that one is cancelled, or the answer is late, the stream ends with it. So an answer can never reach
somebody else, and several requests at a time are several streams.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Protocol

import grpc
import structlog
from google.protobuf.message import DecodeError

from samepage.daemon.addresses import host_and_port
from samepage.daemon.roles import Role
from samepage.daemon.tls import Tls
from samepage.v1 import pages_pb2, pages_pb2_grpc
from samepage_merger.cluster.connection import Connection
from samepage_merger.cluster.digests import DIGEST_BYTES, FINGERPRINT_BYTES
from samepage_merger.cluster.fetched import METHOD, Fetched, parse

#: Of a message from the other end.
RESPONSE_MAX = 16 << 20
_CALL_PAGES = 512
_CONNECT_SECONDS = 2.0
_REST_SECONDS = 300.0

log = structlog.get_logger(__name__)


class StreamEndedError(Exception):
    """The other end has ended the stream, or never began it: `args[0]` says why."""


class FetchStream(Protocol):
    """A way to a holder, for one request at a time."""

    @property
    def until(self) -> float:
        """When to look for a better one (time.monotonic())."""

    async def ask(self, request: pages_pb2.FetchRequest) -> Fetched:
        """Ask for pages.

        Raises:
            StreamEndedError: there is no answer.
        """

    def close(self) -> None:
        """End it."""


class GrpcStream:
    """A call of Fetch. At its other end may be an older merger: it is asked for a few pages at a
    time."""

    def __init__(self, channel: grpc.aio.Channel, until: float) -> None:
        self.until = until
        fetch: grpc.aio.StreamStreamMultiCallable[pages_pb2.FetchRequest, Fetched]
        fetch = channel.stream_stream(
            METHOD, pages_pb2.FetchRequest.SerializeToString, response_deserializer=parse
        )
        self._call = fetch()

    async def ask(self, request: pages_pb2.FetchRequest) -> Fetched:
        """See FetchStream."""
        if len(request.digests) <= _CALL_PAGES * DIGEST_BYTES:
            return await self._ask_some(request)
        parts = [await self._ask_some(part) for part in _cut(request)]
        pages = b"".join(part.pages for part in parts)
        return Fetched(b"".join(part.found for part in parts), memoryview(pages))

    async def _ask_some(self, request: pages_pb2.FetchRequest) -> Fetched:
        try:
            await self._call.write(request)
            response = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else None
            raise StreamEndedError(details or str(error)) from error
        if not isinstance(response, Fetched):
            raise StreamEndedError("it ended the stream")
        return response

    def close(self) -> None:
        """End the call."""
        self._call.cancel()


def _cut(request: pages_pb2.FetchRequest) -> Iterator[pages_pb2.FetchRequest]:
    for low in range(0, len(request.digests) // DIGEST_BYTES, _CALL_PAGES):
        high = low + _CALL_PAGES
        yield pages_pb2.FetchRequest(
            domain_id=request.domain_id,
            digests=request.digests[low * DIGEST_BYTES : high * DIGEST_BYTES],
            fingerprints=request.fingerprints[low * FINGERPRINT_BYTES : high * FINGERPRINT_BYTES],
        )


class DataStream:
    """A data connection."""

    until = math.inf

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def ask(self, request: pages_pb2.FetchRequest) -> Fetched:
        """See FetchStream."""
        try:
            await self._connection.send([request.SerializeToString()])
            return parse(await self._connection.receive())
        except (OSError, DecodeError) as error:
            raise StreamEndedError(str(error)) from error

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


class Streams:
    """Opens streams to one host.

    Args:
        tls: for data connections; None: without.

    Attributes:
        unreachable: whether the host takes data connections, and the last one could not be made.
    """

    def __init__(self, host: str, tls: Tls | None) -> None:
        self.unreachable = False
        self._host = host
        self._tls = tls
        self._connecting = asyncio.Lock()
        self._no_data_until = 0.0

    async def open(self, channel: grpc.aio.Channel, address: str) -> FetchStream:
        """Return a new stream.

        Args:
            channel: to the host's merger.
            address: of it.

        Raises:
            StreamEndedError: the merger does not answer.
        """
        stream = await self._data_stream(channel, address)
        return stream or GrpcStream(channel, self._no_data_until)

    async def _data_stream(self, channel: grpc.aio.Channel, address: str) -> DataStream | None:
        """Return a data connection, or None for a while after there was none."""
        async with self._connecting:
            if time.monotonic() < self._no_data_until:
                return None
            port = await self._port(channel)
            # Whoever waits for this for too long goes on without.
            self._no_data_until = time.monotonic() + _REST_SECONDS
            if port == 0:
                return None
            host, _ = host_and_port(address)
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    connection = await self._connect(host, port)
            except OSError as error:
                log.warning(
                    "pages come over gRPC, which is slower: see whether firewalls and network"
                    " policies let mergers connect to each other's data_listen",
                    host=self._host,
                    address=f"{host}:{port}",
                    why=str(error) or "it does not answer",
                )
                self.unreachable = True
                return None
            self.unreachable = False
            self._no_data_until = 0.0
            return DataStream(connection)

    async def _port(self, channel: grpc.aio.Channel) -> int:
        """Return where the merger takes data connections, 0 for nowhere.

        Raises:
            StreamEndedError: it does not say.
        """
        connect = pages_pb2_grpc.PagesStub(channel).Connect
        try:
            answer = await connect(pages_pb2.ConnectRequest(), timeout=_CONNECT_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return 0
            raise StreamEndedError(error.details() or str(error.code())) from error
        return answer.port

    async def _connect(self, host: str, port: int) -> Connection:
        tls = self._tls
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(RESPONSE_MAX),
            host,
            port,
            ssl=tls.client_context() if tls is not None else None,
            server_hostname=Role.MERGER.dns_name if tls is not None else None,
        )
        return connection
