"""Daemons by hand: each step of the conversation with an agent is a call."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE, Type

SLOTS = 16
WINDOW = wire.READ_PAGES_MAX * PAGE_SIZE
SCANNER_WINDOW = wire.FINGERPRINT_PAGES_MAX * 17


class Merger:
    """A merger."""

    name = "merger.sock"
    window_bytes = WINDOW

    def __init__(self, directory: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(directory / self.name))
        self.listener.listen()
        self.listener.settimeout(20)
        self.device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        self.store = os.memfd_create("store")
        os.ftruncate(self.store, SLOTS * PAGE_SIZE)
        self.window = os.memfd_create("window", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.window, self.window_bytes)
        self.agent = socket.socket()

    def accept(self) -> None:
        """Take the agent's connection."""
        self.agent.close()
        self.agent, _ = self.listener.accept()
        self.agent.settimeout(20)

    def seal(self) -> None:
        """Seal the window, as the protocol asks for."""
        fcntl.fcntl(self.window, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def receive(self, kind: Type) -> wire.Message:
        """Return the next message, which must be of this kind."""
        message = wire.parse(self.agent.recv(wire.MESSAGE_MAX))
        assert message.type is kind
        return message

    def welcome(self) -> None:
        """Accept, and answer HELLO."""
        self.accept()
        hello = self.receive(Type.HELLO)
        packet = wire.pack(Type.WELCOME, hello.seq, 0, wire.WELCOME.pack(self.window_bytes, 1, 0))
        socket.send_fds(self.agent, [packet], [self.window, self.device])

    def open_arena(self) -> None:
        """Answer ARENA_OPEN."""
        wanted = self.receive(Type.ARENA_OPEN)
        packet = wire.pack(Type.ARENA_OPENED, wanted.seq, wanted.arena, wire.ARENA_OPENED.pack(7))
        socket.send_fds(self.agent, [packet], [self.store])

    def order(self, kind: Type, payload: bytes) -> None:
        """Send an order to arena 1."""
        self.agent.send(wire.pack(kind, 99, 1, payload))

    def close(self) -> None:
        """Close everything."""
        self.agent.close()
        self.listener.close()
        for fd in (self.device, self.store, self.window):
            os.close(fd)

    def write_slot(self, slot: int, data: bytes) -> None:
        """Put a page into the store."""
        os.pwrite(self.store, data, slot * PAGE_SIZE)

    def read_window(self, offset: int, length: int) -> bytes:
        """Return bytes of the window."""
        return os.pread(self.window, length, offset)

    def ask(self, kind: Type, payload: bytes) -> int:
        """Give an order and return the error in its DONE."""
        self.order(kind, payload)
        error, _ = wire.unpack_outcomes(self.receive(Type.DONE))
        return error


class Scanner(Merger):
    """A scanner, whose arenas have the seed 7."""

    name = "scanner.sock"
    window_bytes = SCANNER_WINDOW

    def open_arena(self) -> None:
        """Answer ARENA_OPEN."""
        wanted = self.receive(Type.ARENA_OPEN)
        payload = wire.ARENA_OPENED.pack(7)
        self.agent.send(wire.pack(Type.ARENA_OPENED, wanted.seq, wanted.arena, payload))

    def changed(self, page: int, count: int) -> list[tuple[int, int]]:
        """Which pages were written; all of the range must have been told of."""
        assert self.ask(Type.CHANGED, wire.PAGE_RANGE.pack(page, count)) == 0
        told, n = wire.CHANGED.unpack(self.read_window(0, wire.CHANGED.size))
        assert told == count
        ranges = np.frombuffer(self.read_window(wire.CHANGED.size, n * 16), "<u8").reshape(n, 2)
        return [(int(first), int(length)) for first, length in ranges]

    def fingerprint(self, *ranges: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], list[int]]:
        """Fingerprints and page states of ranges of pages."""
        payload = b"".join(wire.PAGE_RANGE.pack(*pages) for pages in ranges)
        assert self.ask(Type.FINGERPRINT, payload) == 0
        count = sum(length for _, length in ranges)
        prints = np.frombuffer(self.read_window(0, count * 16), np.uint8).reshape(count, 16)
        return prints, list(self.read_window(count * 16, count))
