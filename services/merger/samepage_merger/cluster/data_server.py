"""Takes data connections of other mergers, and answers what they fetch there (connection.py).

Without TLS whoever can connect may fetch, as over gRPC; with it, whoever has the role.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine

import structlog
from google.protobuf.message import DecodeError

from samepage.daemon.addresses import host_and_port
from samepage.daemon.roles import refusal
from samepage.daemon.server import ListenError
from samepage.daemon.tls import Tls
from samepage.v1 import pages_pb2
from samepage_merger.cluster.answering import FETCH_MAX, Answers
from samepage_merger.cluster.connection import Connection
from samepage_merger.cluster.digests import DIGEST_BYTES, FINGERPRINT_BYTES
from samepage_merger.cluster.fetched import METHOD
from samepage_merger.cluster.requests import BadRequestError

_HANDSHAKE_SECONDS = 10.0
# Where this process has no descriptor left, say.
_REST_SECONDS = 1.0
_BACKLOG = 128
_REQUEST_MAX = FETCH_MAX * (DIGEST_BYTES + FINGERPRINT_BYTES) + 1024

log = structlog.get_logger(__name__)


class DataServer:
    """Serves data connections.

    Args:
        tls: None: without.
    """

    def __init__(self, answers: Answers, tls: Tls | None = None) -> None:
        self._answers = answers
        self._tls = tls
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, listen: str) -> int:
        """Take connections at "host:port" from now on; return the port.

        Raises:
            ListenError: it cannot be served on.
        """
        try:
            self._listener = await _bind(listen)
        except OSError as error:
            raise ListenError(
                f"cannot take data connections on {listen} ({error.strerror}): set data_listen to"
                " another address, or end the process that uses it"
            ) from error
        self._spawn(self._accept_forever(self._listener))
        port: int = self._listener.getsockname()[1]
        return port

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._listener is not None:
            self._listener.close()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a data connection failed", exc_info=error)

    async def _accept_forever(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("cannot take a data connection", why=error.strerror)
                await asyncio.sleep(_REST_SECONDS)
                continue
            self._spawn(self._serve(accepted))

    async def _serve(self, accepted: socket.socket) -> None:
        connection = Connection(_REQUEST_MAX)
        try:
            await self._begin(connection, accepted)
            while True:
                message = await connection.receive()
                request = pages_pb2.FetchRequest.FromString(bytes(message))
                async with self._answers.answer(request) as parts:
                    await connection.send(parts)
        except (BadRequestError, DecodeError) as error:
            log.warning("a data connection is refused", why=str(error))
        except OSError as error:
            log.debug("a data connection has ended", why=str(error))
        finally:
            connection.close()
            accepted.close()

    async def _begin(self, connection: Connection, accepted: socket.socket) -> None:
        """Greet whoever connected.

        Raises:
            OSError: it does not keep to TLS, or has gone.
            BadRequestError: it has not the role.
        """
        tls = self._tls
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: connection,
            accepted,
            ssl=tls.server_context() if tls is not None else None,
            ssl_handshake_timeout=_HANDSHAKE_SECONDS if tls is not None else None,
        )
        if tls is not None:
            text = refusal(METHOD, _names(connection.extra("ssl_object")))
            if text is not None:
                raise BadRequestError(text)


async def _bind(listen: str) -> socket.socket:
    host, port = host_and_port(listen)
    loop = asyncio.get_running_loop()
    family, _, _, _, address = (
        await loop.getaddrinfo(
            host,
            int(port),
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    )[0]
    # What gRPC does at this address, too.
    both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def _names(of: ssl.SSLObject) -> set[str]:
    certificate = of.getpeercert() or {}
    return {str(name[1]) for name in certificate.get("subjectAltName", ()) if name[0] == "DNS"}
