"""A data connection: on it pages cross between mergers, in messages, each behind its length.

Theory. gRPC takes 3.5 ms of processor time a MiB on both ends together, a socket 0.7
(docs/decisions/0011-data-connections.md). So here bytes go from the socket straight into a buffer
of the message's size, and to the socket straight from where they lie. There is one message at a
time each way: while nobody takes the last one, nothing more is read. With TLS bytes pass the ssl
module on the way; then they are sent in slices, each of which waits until the one before has gone,
since asyncio copies what a socket does not take at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from samepage_merger.cluster.away import Bytes

_LENGTH = struct.Struct("<I")
_SLICE_BYTES = 256 << 10
# IOV_MAX of Linux.
_PARTS_MAX = 1024
# A peer whose machine is gone is noticed in a minute, also where nothing is sent.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 8),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
)


class Connection(asyncio.BufferedProtocol):
    """One end of a data connection.

    Args:
        longest: bytes that a message from the other end may have.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._transport: asyncio.Transport | None = None
        self._length = memoryview(bytearray(_LENGTH.size))
        self._filling = self._length
        self._at = 0
        self._message: memoryview | None = None
        self._received: asyncio.Future[None] | None = None
        self._sent: asyncio.Future[None] | None = None
        self._full = False
        # Without TLS: the transport's socket once more, to send to.
        self._socket: socket.socket | None = None
        self._sending = False
        self._lost: ConnectionError | None = None

    def extra(self, name: str) -> Any:
        """Return what the transport knows by this name (asyncio's get_extra_info)."""
        assert self._transport is not None
        return self._transport.get_extra_info(name)

    async def receive(self) -> memoryview:
        """Return the next message, which nothing else uses; it is for one task at a time.

        Raises:
            ConnectionError: the connection has ended, or the other end keeps to no protocol.
        """
        assert self._transport is not None
        if self._message is None:
            self._check()
            self._transport.resume_reading()
            self._received = asyncio.get_running_loop().create_future()
            try:
                await self._received
            finally:
                self._received = None
        message, self._message = self._message, None
        assert message is not None
        return message

    async def send(self, parts: Sequence[Bytes]) -> None:
        """Send a message that is in parts, and return when the socket has it; it is for one task
        at a time. The parts must stay as they are meanwhile.

        Raises:
            ConnectionError: the connection has ended.
        """
        self._check()
        size = sum(len(part) for part in parts)
        views = [memoryview(part) for part in (_LENGTH.pack(size), *parts) if len(part)]
        await (self._send_plain(views) if self._socket is not None else self._send_tls(views))

    def close(self) -> None:
        """End it now."""
        self._lost = self._lost or ConnectionError("the connection was closed")
        if self._transport is not None:
            self._transport.abort()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if not self._sending:
                self._socket.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # With 0 a TLS transport would pause for nothing, and not go on.
        transport.set_write_buffer_limits(1, 0)
        for option in _KEEPALIVE:
            transport.get_extra_info("socket").setsockopt(*option)
        if transport.get_extra_info("ssl_object") is None:
            self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            self._socket.setblocking(False)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where bytes go."""
        return self._filling[self._at :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        self._at += nbytes
        if self._at < len(self._filling):
            return
        if self._filling is self._length:
            (size,) = _LENGTH.unpack(self._length)
            if 0 < size <= self._longest:
                self._begin(np.empty(size, np.uint8).data)
            else:
                self._end(ConnectionError(f"a message of {size} bytes"))
            return
        self._message = self._filling
        self._begin(self._length)
        if self._received is not None and not self._received.done():
            self._received.set_result(None)
        else:
            assert self._transport is not None
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """Nothing more comes, and nobody listens."""
        self._end(ConnectionError("the other end has ended the connection"))

    def pause_writing(self) -> None:
        """The socket has taken enough for now."""
        self._full = True

    def resume_writing(self) -> None:
        """The socket has sent it."""
        self._full = False
        if self._sent is not None and not self._sent.done():
            self._sent.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self._end(ConnectionError(str(exc) or "the connection has ended"))

    async def _send_plain(self, views: list[memoryview]) -> None:
        """Send without a copy, and all that goes at once in one call: the other end is woken by
        the first byte, and should find more than that."""
        assert self._socket is not None
        self._sending = True
        try:
            with contextlib.suppress(BlockingIOError):
                views = _without(views, self._socket.sendmsg(views[:_PARTS_MAX]))
            for view in views:
                await asyncio.get_running_loop().sock_sendall(self._socket, view)
        finally:
            self._sending = False
            if self._lost is not None:
                self._socket.close()

    async def _send_tls(self, views: list[memoryview]) -> None:
        assert self._transport is not None
        for view in views:
            for low in range(0, len(view), _SLICE_BYTES):
                self._transport.write(view[low : low + _SLICE_BYTES])
                while self._full:
                    self._check()
                    self._sent = asyncio.get_running_loop().create_future()
                    await self._sent

    def _begin(self, buffer: memoryview) -> None:
        self._filling, self._at = buffer, 0

    def _end(self, why: ConnectionError) -> None:
        self._lost = self._lost or why
        for waiting in (self._received, self._sent):
            if waiting is not None and not waiting.done():
                waiting.set_exception(self._lost)
        self.close()

    def _check(self) -> None:
        if self._lost is not None:
            raise ConnectionError(*self._lost.args)
        # What it cannot send any more a transport drops.
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection has ended")


def _without(views: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of bytes without the first so many."""
    for at, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[at + 1 :]]
        count -= len(view)
    return []
