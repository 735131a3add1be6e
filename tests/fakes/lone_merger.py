"""A merger that speaks the real protocol, welcomes agents and shares nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from samepage.daemon import wire

_WINDOW_BYTES = wire.READ_PAGES_MAX * wire.PAGE_SIZE
_STORE_BYTES = 16 * wire.PAGE_SIZE


class LoneMerger:
    """Serves `merger.sock` in a directory, each connection by a thread, until the context ends.

    Args:
        directory: where.
        version: the only one of the protocol that it speaks.
        silent: it accepts, and never answers.
        dies_of: a type of message that it hangs up on.

    Attributes:
        opened: names of all arenas that were announced.
    """

    def __init__(
        self,
        directory: Path,
        version: int = wire.VERSION,
        silent: bool = False,
        dies_of: wire.Type | None = None,
    ) -> None:
        self.opened: list[str] = []
        self._dies_of = dies_of
        self.directory = directory
        self._version = version
        self._silent = silent
        self._names: set[tuple[str, str]] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._peers: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._socket.bind(str(self.directory / "merger.sock"))
        self._socket.listen()
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for end in (self._socket, *self._peers):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError as failure:
                assert failure.errno == errno.ENOTCONN  # the agent has gone before
        for thread in self._threads:
            thread.join()
        self._socket.close()
        for peer in self._peers:
            peer.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return  # shut down
            self._peers.append(peer)
            self._threads.append(threading.Thread(target=self._serve, args=(peer,)))
            self._threads[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        names: dict[int, tuple[str, str]] = {}
        while True:
            try:
                packet = peer.recv(wire.MESSAGE_MAX)
            except ConnectionResetError:
                packet = b""
            if not packet:
                self._names -= set(names.values())
                return
            if self._silent:
                continue
            message = wire.parse(packet)
            if message.type is self._dies_of:
                peer.shutdown(socket.SHUT_RDWR)
            else:
                self._handle(peer, message, names)

    def _handle(
        self, peer: socket.socket, message: wire.Message, names: dict[int, tuple[str, str]]
    ) -> None:
        if message.type is wire.Type.HELLO:
            self._welcome(peer, message)
        elif message.type is wire.Type.ARENA_OPEN:
            opened = wire.unpack_arena_open(message)
            self.opened.append(opened.name)
            key = (opened.domain, opened.name)
            if key in self._names:
                self._refuse(peer, message, errno.EEXIST, f"the name {opened.name!r} is taken")
                return
            self._names.add(key)
            names[message.arena] = key
            answer = wire.pack_arena_opened(message.arena, opened.domain, "default")
            self._answer(peer, message, wire.Type.ARENA_OPENED, answer, _memfd(_STORE_BYTES))
        elif message.type is wire.Type.ARENA_CLOSE:
            self._names.discard(names.pop(message.arena))
        elif message.type is wire.Type.ACCOUNT:
            self._answer(peer, message, wire.Type.ACCOUNTED, wire.ACCOUNTED.pack(0, 0))

    def _welcome(self, peer: socket.socket, message: wire.Message) -> None:
        if message.version != self._version:
            self._refuse(peer, message, errno.EPROTONOSUPPORT, "another version")
            return
        descriptors = [_memfd(_WINDOW_BYTES)]
        if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
            descriptors.append(os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC))
        payload = wire.WELCOME.pack(_WINDOW_BYTES, len(descriptors) - 1, 0)
        self._answer(peer, message, wire.Type.WELCOME, payload, *descriptors)

    def _refuse(self, peer: socket.socket, message: wire.Message, number: int, text: str) -> None:
        payload = wire.REFUSED.pack(number) + text.encode()
        self._answer(peer, message, wire.Type.REFUSED, payload)

    def _answer(
        self,
        peer: socket.socket,
        message: wire.Message,
        kind: wire.Type,
        payload: bytes,
        *descriptors: int,
    ) -> None:
        packet = wire.pack(kind, message.seq, message.arena, payload, self._version)
        socket.send_fds(peer, [packet], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _memfd(size: int) -> int:
    descriptor = os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor
