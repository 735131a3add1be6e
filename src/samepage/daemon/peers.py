"""The daemon's end of the agents' unix sockets.

Theory. One `PeerServer` listens on one socket; each connection is a `Peer`. Everything runs in
the event loop's thread, and packets are handled strictly in the order in which they came: the
merger's books are right only because an order's outcome and a later notice of a write are applied
in the order in which the mappings changed. So a reply's effect (`apply`) runs inside the receiver,
before the next packet is read, and whoever awaits the order merely learns of it later.

A peer is never waited for with a blocking call and never trusted: what breaks the protocol ends
its connection alone.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from samepage.daemon import wire
from samepage.daemon.identity import Identity, SocketIdentity

_CREDENTIALS = struct.Struct("=iII")
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
# What Python takes from getsockopt().
_GROUPS_BYTES_MAX = 1024
_SEND_QUEUE_MAX = 1024
_PACKETS_A_WAKEUP = 64
_DESCRIPTORS_MAX = 4
_ACCEPT_PAUSE_SECONDS = 0.5

Outcomes = npt.NDArray[np.uint8]
Apply = Callable[[Outcomes], None]

log = structlog.get_logger(__name__)


class PeerGoneError(Exception):
    """The agent's connection ended before it answered."""


class OrderRefusedError(Exception):
    """The agent could not carry out an order; `args[0]` is the errno it gave."""


class Handler(Protocol):
    """What a daemon does with its peers. Called in the event loop, must not block."""

    def connected(self, peer: Peer) -> None:
        """The peer has said HELLO and was welcomed."""

    def received(self, peer: Peer, message: wire.Message, descriptors: Sequence[int]) -> None:
        """A message other than HELLO and DONE came. The descriptors are closed afterwards.

        Raises:
            ProtocolError: drop the peer.
        """

    def disconnected(self, peer: Peer) -> None:
        """The connection ended, for whatever reason. Called once, after `connected` only."""


@dataclass(slots=True)
class _Order:
    future: asyncio.Future[Outcomes]
    outcomes: int
    apply: Apply | None


class Peer:
    """One agent's connection.

    Attributes:
        agent: its 16-byte number.
        pid, uid, gid: from SO_PEERCRED; pid is 0 across pid namespaces.
        gids: the same and the supplementary groups, from SO_PEERGROUPS.
        features: bits of docs/protocol.md.
        version: of the protocol, as its HELLO had it.
        window: the memory shared with this agent.
    """

    def __init__(self, server: PeerServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._orders: dict[int, _Order] = {}
        self._last_seq = 0
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        self.gids = _groups(sock, self.gid)
        self._reviewing: asyncio.Task[None] | None = None
        self.agent = b""
        self.features = 0
        self.version = wire.VERSION
        self.closed = False
        self._window_fd = _make_window(server.window_bytes)
        self.window = mmap.mmap(self._window_fd, server.window_bytes)
        self._loop.add_reader(sock, self._readable)

    async def order(
        self,
        kind: wire.Type,
        arena: int,
        payload: bytes,
        *,
        outcomes: int = 0,
        apply: Apply | None = None,
        timeout: float | None = None,
    ) -> Outcomes:
        """Send an order and return its outcomes, one a page.

        `apply` is called with them in the order of the agent's messages, also when this call was
        cancelled or timed out meanwhile.

        Raises:
            PeerGoneError: the connection ended first.
            OrderRefusedError: the agent did nothing.
            TimeoutError: no answer in `timeout` seconds; the order stays in flight.
        """
        answer = self.give(kind, arena, payload, outcomes=outcomes, apply=apply)
        async with asyncio.timeout(timeout):
            return await asyncio.shield(answer)

    def give(
        self,
        kind: wire.Type,
        arena: int,
        payload: bytes,
        *,
        outcomes: int = 0,
        apply: Apply | None = None,
    ) -> asyncio.Future[Outcomes]:
        """Send an order as `order` does; its answer to come, which nobody may cancel.

        Raises:
            PeerGoneError: the connection has ended.
        """
        if self.closed:
            raise PeerGoneError
        self._last_seq = self._last_seq % 0xFFFF_FFFF + 1
        seq = self._last_seq
        answer: asyncio.Future[Outcomes] = self._loop.create_future()
        self._orders[seq] = _Order(answer, outcomes, apply)
        self.send(kind, seq, arena, payload)
        return answer

    def send(
        self,
        kind: wire.Type,
        seq: int = 0,
        arena: int = 0,
        payload: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send a message, now or as soon as the agent reads. Descriptors are duplicated."""
        if self.closed:
            return
        if len(self._queue) >= _SEND_QUEUE_MAX:
            self._drop("does not read its socket")
            return
        packet = wire.pack(kind, seq, arena, payload, self.version)
        self._queue.append((packet, tuple(os.dup(fd) for fd in descriptors)))
        self._flush()

    def refuse(self, request: wire.Message, error: int, text: str) -> None:
        """Answer a request that cannot be met: `error` is an errno, `text` says what to do."""
        payload = wire.REFUSED.pack(error) + text.encode()
        self.send(wire.Type.REFUSED, request.seq, request.arena, payload)

    def close(self) -> None:
        """End the connection and tell the handler. Closing twice is fine."""
        if self.closed:
            return
        self.closed = True
        if self._reviewing is not None:
            self._reviewing.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        while self._queue:
            _close_all(self._queue.popleft()[1])
        os.close(self._window_fd)
        self._server.forget(self)
        for order in self._orders.values():
            if not order.future.done():
                order.future.set_exception(PeerGoneError())
                order.future.exception()
        self._orders.clear()

    def _flush(self) -> None:
        while self._queue:
            packet, descriptors = self._queue[0]
            try:
                if descriptors:
                    socket.send_fds(self._sock, [packet], list(descriptors))
                else:
                    self._sock.send(packet)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self.close()
                return
            self._queue.popleft()
            _close_all(descriptors)
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(_PACKETS_A_WAKEUP):
            try:
                packet, descriptors, flags, _ = socket.recv_fds(
                    self._sock, wire.MESSAGE_MAX + 1, _DESCRIPTORS_MAX
                )
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            try:
                if not packet:
                    self.close()
                    return
                if flags & socket.MSG_CTRUNC:
                    raise wire.ProtocolError("too many descriptors in one message")
                self._dispatch(wire.parse(packet), descriptors)
            except wire.UnsupportedVersionError as error:
                self._refuse_version(str(error))
            except wire.ProtocolError as error:
                self._drop(str(error))
            finally:
                _close_all(descriptors)
            if self.closed or self._reviewing is not None:
                return

    def _dispatch(self, message: wire.Message, descriptors: Sequence[int]) -> None:
        if message.type is wire.Type.HELLO:
            self._hello(message)
        elif not self.agent:
            raise wire.ProtocolError(f"{message.type.name} before HELLO")
        elif message.version != self.version:
            raise wire.ProtocolError(f"a message of version {message.version}")
        elif message.type is wire.Type.DONE:
            self._done(message)
        elif message.type is wire.Type.CREDENTIAL:
            self._credential(message)
        else:
            self._server.handler.received(self, message, descriptors)

    def _hello(self, message: wire.Message) -> None:
        if self.agent:
            raise wire.ProtocolError("HELLO twice")
        if len(message.payload) != wire.HELLO.size:
            raise wire.ProtocolError(f"HELLO with {len(message.payload)} bytes of payload")
        agent, pid, self.features = wire.HELLO.unpack(message.payload)
        if agent == bytes(16):
            raise wire.ProtocolError("HELLO without an agent number")
        self.agent = agent
        self.version = message.version
        passed = [self._window_fd, *self._server.welcome_descriptors]
        payload = wire.WELCOME.pack(self._server.window_bytes, len(passed) - 1, 0)
        self.send(wire.Type.WELCOME, message.seq, 0, payload, passed)
        log.debug("agent connected", pid=self.pid or pid, uid=self.uid)
        self._server.handler.connected(self)

    def _credential(self, message: wire.Message) -> None:
        """Let the identity see it. Until that is done, the peer's next messages wait."""
        review = self._server.identity.present(self, message.payload)
        if review is not None:
            self._loop.remove_reader(self._sock)
            self._reviewing = self._loop.create_task(review)
            self._reviewing.add_done_callback(self._reviewed)

    def _reviewed(self, review: asyncio.Task[None]) -> None:
        self._reviewing = None
        if self.closed or review.cancelled():
            return
        if (error := review.exception()) is not None:
            log.critical("a credential was not looked at", exc_info=error)
            self.close()
            return
        self._loop.add_reader(self._sock, self._readable)

    def in_control_group(self, *names: str) -> bool | None:
        """Whether the path of the process's control group holds one of these names; None when
        that cannot be seen. True to the process at the other end, not to a later one of its pid.
        """
        if self.pid == 0:
            return None
        try:
            pidfd = self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            return None
        try:
            group = Path(f"/proc/{self.pid}/cgroup").read_text()
            # Still there, so what was read was its own.
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return None
        finally:
            os.close(pidfd)
        return any(name in group for name in names)

    def _done(self, message: wire.Message) -> None:
        order = self._orders.get(message.seq)
        if order is None:
            raise wire.ProtocolError(f"DONE to order {message.seq}, which was not given")
        error, outcomes = wire.unpack_outcomes(message)
        if error == 0 and outcomes.size != order.outcomes:
            raise wire.ProtocolError(f"{outcomes.size} outcomes instead of {order.outcomes}")
        if error == 0 and order.apply is not None:
            order.apply(outcomes)
        # Only now: what raised above closes the peer, and that ends the orders still listed.
        self._orders.pop(message.seq, None)
        if order.future.done():
            return
        if error:
            order.future.set_exception(OrderRefusedError(error))
        else:
            order.future.set_result(outcomes)

    def _refuse_version(self, text: str) -> None:
        payload = wire.REFUSED.pack(errno.EPROTONOSUPPORT) + text.encode()
        self.send(wire.Type.REFUSED, 0, 0, payload)
        self._drop(text)

    def _drop(self, why: str) -> None:
        log.warning("agent dropped", pid=self.pid, uid=self.uid, why=why)
        self.close()


class PeerServer:
    """A listening socket and its peers.

    Args:
        path: the socket; a stale one is replaced.
        handler: gets the peers' messages.
        window_bytes: size of each peer's window.
        welcome_descriptors: passed with every WELCOME, after the window; at most one.
        identity: gets the credentials that peers show.
    """

    def __init__(
        self,
        path: Path,
        handler: Handler,
        window_bytes: int,
        welcome_descriptors: Sequence[int] = (),
        identity: Identity | None = None,
    ) -> None:
        self.path = path
        self.handler = handler
        self.window_bytes = window_bytes
        self.welcome_descriptors = tuple(welcome_descriptors)
        self.identity = identity or SocketIdentity()
        self._peers: set[Peer] = set()
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Listen; any user of the host may connect.

        Raises:
            OSError: the directory is missing, or may not be written.
        """
        self.path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        sock.bind(str(self.path))
        self.path.chmod(0o666)
        sock.listen(128)
        self._sock = sock
        asyncio.get_running_loop().add_reader(sock, self._accept)

    def stop(self) -> None:
        """Close the socket and every connection."""
        if self._sock is None:
            return
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._sock = None
        self.path.unlink(missing_ok=True)
        for peer in list(self._peers):
            peer.close()

    def forget(self, peer: Peer) -> None:
        """Called by a peer that closed."""
        self._peers.discard(peer)
        self.identity.forget(peer)
        if peer.agent:
            self.handler.disconnected(peer)

    def _accept(self) -> None:
        if self._sock is None:
            return
        try:
            sock, _ = self._sock.accept()
            sock.setblocking(False)
            self._peers.add(Peer(self, sock))
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, as a rule: asking again at once would only burn the processor.
            log.warning("cannot accept an agent", error=str(error))
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._sock)
            loop.call_later(_ACCEPT_PAUSE_SECONDS, self._listen_again)

    def _listen_again(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)


def _groups(sock: socket.socket, gid: int) -> frozenset[int]:
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
    except OSError as error:
        log.warning("only the first group of a process counts", gid=gid, why=error.strerror)
        packed = b""
    return frozenset(struct.unpack(f"={len(packed) // 4}I", packed)) | {gid}


def _make_window(size: int) -> int:
    fd = os.memfd_create("samepage-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
