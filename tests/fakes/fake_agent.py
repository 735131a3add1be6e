"""A scanner's agent in Python: speaks docs/protocol.md over arrays instead of mappings."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE, PageState, Type
from samepage_scanner.books import TRACKS_WRITES

Range = tuple[int, int]
Memory = npt.NDArray[np.uint8]


class RefusedError(Exception):
    """The daemon refused a request: `error` is an errno."""

    def __init__(self, error: int, text: str) -> None:
        super().__init__(error, text)
        self.error = error
        self.text = text


class DroppedError(Exception):
    """The daemon ended the connection."""


def random_pages(count: int, seed: int) -> Memory:
    """`count` pages of noise, the same for the same seed."""
    noise = np.random.default_rng(seed)
    return noise.integers(0, 256, (count, PAGE_SIZE), np.uint8)


@dataclass(eq=False)
class FakeArena:
    """Pages in an array; `absent` and `shared` stand for what the mappings would say.

    Attributes:
        touched: pages that were written with what they held already.
        told: by page, what it held when CHANGED told of it last.
    """

    number: int
    name: str
    domain: str
    memory: Memory
    absent: npt.NDArray[np.bool_]
    shared: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_]
    seed: int = 0
    touched: set[int] = field(default_factory=set)
    told: dict[int, bytes] = field(default_factory=dict)

    def states(self) -> npt.NDArray[np.uint8]:
        """wire.PageState by page."""
        states = np.full(len(self.memory), PageState.PRIVATE, np.uint8)
        states[~self.memory.any(axis=1)] = PageState.ZERO
        states[self.shared] = PageState.SHARED
        states[self.absent] = PageState.ABSENT
        return states

    def fingerprint(self, page: int) -> bytes:
        """The page's fingerprint, as docs/protocol.md defines it."""
        if self.absent[page]:
            return bytes(16)
        return xxhash.xxh3_128_digest(self.memory[page].tobytes(), self.seed)

    def take_written(self, first: int, count: int, ranges_max: int) -> tuple[int, list[Range]]:
        """What CHANGED answers: pages told of, and ranges. Discarded and merged pages are none."""
        ranges: list[Range] = []
        for page in range(first, first + count):
            held = b"" if self.absent[page] else self.memory[page].tobytes()
            if not held or (self.told.get(page) == held and page not in self.touched):
                continue
            if ranges and sum(ranges[-1]) == page:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
            elif len(ranges) < ranges_max:
                ranges.append((page, 1))
            else:
                return page - first, ranges
            self.told[page] = held
            self.touched.discard(page)
        return count, ranges


class FakeAgent:
    """One connection to a scanner.

    Args:
        version: of the protocol.

    Attributes:
        on_order: called with every order instead of answering it, if set.
        ranges_max: ranges of written pages that it tells of in one answer.
        orders: every order that came.
    """

    def __init__(self, sock: socket.socket, version: int = wire.VERSION) -> None:
        self._sock = sock
        self._version = version
        self._loop = asyncio.get_running_loop()
        self._seq = 0
        self._answers: dict[int, asyncio.Future[wire.Message]] = {}
        self._window: mmap.mmap | None = None
        self.agent = os.urandom(16)
        self.arenas: dict[int, FakeArena] = {}
        self.ranges_max = 100
        self.on_order: Callable[[wire.Message], object] | None = None
        self.orders: list[wire.Message] = []
        self.ordered = asyncio.Event()
        self.notice: asyncio.Future[wire.Message] = self._loop.create_future()
        self.hung_up = asyncio.Event()
        self._loop.add_reader(sock, self._readable)

    @classmethod
    async def connect(
        cls,
        directory: Path,
        hello: bool = True,
        tracks: bool = False,
        version: int = wire.VERSION,
    ) -> FakeAgent:
        """Connect to the scanner in a directory and say HELLO; `tracks`: that it tracks writes."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(directory / "scanner.sock"))
        sock.setblocking(False)
        agent = cls(sock, version)
        if hello:
            payload = wire.HELLO.pack(agent.agent, os.getpid(), TRACKS_WRITES * tracks)
            await agent.request(Type.HELLO, 0, payload)
        return agent

    async def open(self, name: str, memory: Memory, domain: str = "default") -> FakeArena:
        """Announce an arena. Raises RefusedError, DroppedError."""
        none = np.zeros(len(memory), np.bool_)
        number = len(self.arenas) + 1
        arena = FakeArena(number, name, domain, memory, none.copy(), none.copy(), none.copy())
        await self.announce(arena, len(memory))
        self.arenas[number] = arena
        return arena

    async def announce(self, arena: FakeArena, pages: int) -> None:
        """ARENA_OPEN with any number of pages."""
        wanted = wire.ArenaOpen(pages, 0, 0, arena.name, arena.domain)
        payload = wire.pack_arena_open(wanted, self._version)
        opened = await self.request(Type.ARENA_OPEN, arena.number, payload)
        [arena.seed] = wire.ARENA_OPENED.unpack_from(opened.payload)
        arena.domain = opened.payload[wire.ARENA_OPENED.size :].decode() or arena.domain

    async def share(self, arena: FakeArena) -> dict[str, int]:
        """SHARE, and what SHARED says. Raises RefusedError, DroppedError."""
        shared = await self.request(Type.SHARE, arena.number)
        names = "merged differs pinned absent busy no_mapping unsupported unique shared pages"
        names += " no_headroom"
        return dict(zip(names.split(), wire.unpack(wire.SHARED, shared), strict=True))

    def close_arena(self, arena: FakeArena) -> None:
        """ARENA_CLOSE."""
        del self.arenas[arena.number]
        self.send(wire.pack(Type.ARENA_CLOSE, 0, arena.number, b"", self._version))

    async def request(self, kind: Type, arena: int = 0, payload: bytes = b"") -> wire.Message:
        """Send a request and return its answer. Raises RefusedError, DroppedError."""
        self._seq += 1
        answer: asyncio.Future[wire.Message] = self._loop.create_future()
        self._answers[self._seq] = answer
        self.send(wire.pack(kind, self._seq, arena, payload, self._version))
        return _unless_refused(await answer)

    def send(self, packet: bytes) -> None:
        """Send any bytes as one packet."""
        self._sock.send(packet)

    def answer(self, order: wire.Message) -> None:
        """Do an order as it should be done."""
        arena = self.arenas[order.arena]
        ranges: list[Range] = wire.unpack_records(wire.RANGE, order).tolist()
        if order.type is Type.CHANGED:
            [(first, count)] = ranges
            told, written = arena.take_written(first, count, self.ranges_max)
            packed = wire.CHANGED.pack(told, len(written))
            self.write_window(packed + np.array(written, "<u8").tobytes())
        else:
            pages = [page for first, count in ranges for page in range(first, first + count)]
            packed = b"".join(arena.fingerprint(page) for page in pages)
            self.write_window(packed + arena.states()[pages].tobytes())
        self.done(order)

    def write_window(self, data: bytes) -> None:
        """Put bytes at the window's beginning."""
        assert self._window is not None
        self._window[: len(data)] = data

    def done(self, order: wire.Message, error: int = 0, outcomes: bytes = b"") -> None:
        """DONE with anything."""
        payload = wire.DONE.pack(error, len(outcomes)) + outcomes
        self.send(wire.pack(Type.DONE, order.seq, order.arena, payload, self._version))

    def close(self) -> None:
        """End the connection, as a process that dies would."""
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self.hung_up.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(DroppedError())
        self._answers.clear()
        if not self.notice.done():
            self.notice.cancel()

    def _readable(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._sock, wire.MESSAGE_MAX, 4)
        except ConnectionError:
            packet, descriptors = b"", []
        if not packet:
            self.close()
            return
        message = wire.parse(packet)
        if message.type is Type.WELCOME:
            self._window = mmap.mmap(descriptors[0], wire.WELCOME.unpack(message.payload)[0])
        for descriptor in descriptors:
            os.close(descriptor)
        self._received(message)

    def _received(self, message: wire.Message) -> None:
        if message.type in (Type.FINGERPRINT, Type.CHANGED):
            self.orders.append(message)
            self.ordered.set()
            with contextlib.suppress(BrokenPipeError):
                (self.on_order or self.answer)(message)
        elif message.seq in self._answers:
            self._answers.pop(message.seq).set_result(message)
        else:
            self.notice.set_result(message)


def _unless_refused(message: wire.Message) -> wire.Message:
    if message.type is Type.REFUSED:
        [error] = wire.REFUSED.unpack_from(message.payload)
        raise RefusedError(error, message.payload[wire.REFUSED.size :].decode())
    return message
