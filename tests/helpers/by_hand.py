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


def digest_of(page: int) -> bytes:
    """What stands for the digest of a page: the agent only keeps it."""
    return page.to_bytes(wire.DIGEST_BYTES, "big")


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
        """Return the next message, which must be of this kind, or a notice."""
        message = wire.parse(self.agent.recv(wire.MESSAGE_MAX))
        while message.type in (Type.STALLS, Type.SEALED) and message.type is not kind:
            message = wire.parse(self.agent.recv(wire.MESSAGE_MAX))
        assert message.type is kind
        return message

    def welcome(self) -> None:
        """Accept, and answer HELLO."""
        self.accept()
        hello = self.receive(Type.HELLO)
        packet = wire.pack(Type.WELCOME, hello.seq, 0, wire.WELCOME.pack(self.window_bytes, 1, 0))
        socket.send_fds(self.agent, [packet], [self.window, self.device])

    def open_arena(self) -> wire.ArenaOpen:
        """Answer ARENA_OPEN, and return what it says."""
        wanted = self.receive(Type.ARENA_OPEN)
        packet = wire.pack(Type.ARENA_OPENED, wanted.seq, wanted.arena, _opened(wanted))
        socket.send_fds(self.agent, [packet], [self.store])
        return wire.unpack_arena_open(wanted)

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

    def outcomes(self, kind: Type, payload: bytes) -> list[int]:
        """Give an order and return its outcomes."""
        self.order(kind, payload)
        error, outcomes = wire.unpack_outcomes(self.receive(Type.DONE))
        assert error == 0
        return [int(outcome) for outcome in outcomes]

    def make_away(self, first: int, count: int) -> list[int]:
        """Have pages be away; their digest is their number."""
        outcomes: list[int] = []
        for low in range(first, first + count, wire.AWAY_PAGES_MAX):
            pages = range(low, min(low + wire.AWAY_PAGES_MAX, first + count))
            records = b"".join(page.to_bytes(8, "little") + digest_of(page) for page in pages)
            outcomes += self.outcomes(Type.AWAY, records)
        return outcomes

    def write_window(self, data: bytes) -> None:
        """Put bytes at the window's beginning."""
        os.pwrite(self.window, data, 0)

    def fill(self, data: bytes, *ranges: tuple[int, int]) -> list[int]:
        """Fill ranges of away pages with their part of what the whole arena holds."""
        self.write_window(
            b"".join(data[page * PAGE_SIZE : (page + count) * PAGE_SIZE] for page, count in ranges)
        )
        payload = b"".join(wire.PAGE_RANGE.pack(*pages) for pages in ranges)
        return self.outcomes(Type.FILL, payload)

    def evict(self, data: bytes, *ranges: tuple[int, int]) -> list[int]:
        """Have pages evicted that are equal to their part of what the whole arena shall hold."""
        pages = [page + at for page, count in ranges for at in range(count)]
        self.write_window(b"".join(data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] for at in pages))
        payload = b"".join(wire.PAGE_RANGE.pack(*span) for span in ranges)
        return self.outcomes(Type.EVICT, payload + b"".join(digest_of(page) for page in pages))

    def announced(self) -> wire.ArenaOpen:
        """Take an arena that is announced again, with all that is away, and answer."""
        opened = self.receive(Type.ARENA_OPEN)
        wanted = wire.unpack_arena_open(opened)
        told = 0
        if wanted.extents:
            self.receive(Type.EXTENTS)
        while told < wanted.away:
            told += len(wire.unpack_records(wire.AWAY, self.receive(Type.AWAY_PAGES)))
        answer = wire.pack(Type.ARENA_OPENED, opened.seq, 1, wire.ARENA_OPENED.pack(7))
        socket.send_fds(self.agent, [answer], [self.store])
        return wanted

    def wanted(self) -> list[tuple[int, int]]:
        """Return the ranges of the next FETCH."""
        ranges: list[tuple[int, int]] = wire.unpack_records(
            wire.RANGE, self.receive(Type.FETCH)
        ).tolist()
        return ranges

    def ask(self, kind: Type, payload: bytes) -> int:
        """Give an order and return the error in its DONE."""
        self.order(kind, payload)
        error, _ = wire.unpack_outcomes(self.receive(Type.DONE))
        return error


class Scanner(Merger):
    """A scanner, whose arenas have the seed 7."""

    name = "scanner.sock"
    window_bytes = SCANNER_WINDOW

    def open_arena(self) -> wire.ArenaOpen:
        """Answer ARENA_OPEN, and return what it says."""
        wanted = self.receive(Type.ARENA_OPEN)
        packet = wire.pack(Type.ARENA_OPENED, wanted.seq, wanted.arena, _opened(wanted))
        self.agent.send(packet)
        return wire.unpack_arena_open(wanted)

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


def _opened(message: wire.Message) -> bytes:
    """The answer to an ARENA_OPEN, with the lock or seed 7."""
    return wire.pack_arena_opened(7, wire.unpack_arena_open(message).domain, "default")
