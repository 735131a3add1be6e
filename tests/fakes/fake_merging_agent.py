"""An agent that speaks the merger's protocol, with arrays for memory and an honest model of them.

A page that maps a slot has no bytes of its own here: what the application sees is read from the
store through the descriptor that the merger gave. So a slot that was freed too early, or written
again, shows as wrong bytes.

Also a program: `python fake_merging_agent.py SOCKET NAME SEED PAGES [stall]` opens an arena of
pseudo-random pages, prints "open" when it is, and obeys orders; with `stall` it carries the first
REPLACE out, prints "stalled" and never answers.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage.daemon.wire import Outcome

Pages = npt.NDArray[np.uint8]
ALL_FEATURES = 0x1BF


class RefusedError(Exception):
    """The merger refused: `args` are errno and text."""


class FakeArena:
    """An arena: private bytes, and the slots that pages map."""

    def __init__(
        self, owner: FakeMergingAgent, number: int, name: str, domain: str, data: Pages
    ) -> None:
        self.owner = owner
        self.number = number
        self.name = name
        self.domain = domain
        self.data = data
        self.slots = np.zeros(len(data), np.int64)
        self.pinned = np.zeros(len(data), np.bool_)
        self.absent = np.zeros(len(data), np.bool_)
        self.poisoned = np.zeros(len(data), np.bool_)
        self.away: dict[int, bytes] = {}
        self.frozen = False
        self.cloning = False
        self.left = bytes(16)
        self.lock = 0
        self.store = -1

    @property
    def pages(self) -> int:
        return len(self.data)

    def view(self) -> bytes:
        """What the application sees."""
        return b"".join(self.page(page) for page in range(self.pages))

    def page(self, page: int) -> bytes:
        """What the application sees in a page; it must not be away, nor poisoned."""
        assert page not in self.away and not self.poisoned[page]
        slot = int(self.slots[page])
        if slot:
            return os.pread(self.store, wire.PAGE_SIZE, slot * wire.PAGE_SIZE)
        private: bytes = self.data[page].tobytes()
        return private

    def take_back(self, page: int) -> None:
        """Restore one page."""
        if self.slots[page]:
            self.data[page] = np.frombuffer(self.page(page), np.uint8)
            self.slots[page] = 0

    def extents(self) -> npt.NDArray[np.void]:
        """What the arena maps, run by run."""
        pages = np.flatnonzero(self.slots)
        slots = self.slots[pages]
        new = np.ones(pages.size, np.bool_)
        new[1:] = (np.diff(pages) != 1) | (np.diff(slots) != 1)
        starts = np.flatnonzero(new)
        extents = np.empty(starts.size, wire.EXTENT)
        extents["page"] = pages[starts]
        extents["slot"] = slots[starts]
        extents["count"] = np.diff(np.append(starts, pages.size))
        return extents

    def away_records(self) -> npt.NDArray[np.void]:
        """Which pages are away."""
        return np.array(sorted(self.away.items()), wire.AWAY)

    def leave_store(self) -> None:
        """Restore everything and let go of the store."""
        for page in np.flatnonzero(self.slots).tolist():
            self.take_back(page)
        os.close(self.store)
        self.store = -1
        self.lock = 0


class FakeMergingAgent:
    """One agent.

    Args:
        version: of the protocol.

    Attributes:
        obey: clear it, and orders wait until it is set again.
        knows_absent: clear it, and it maps only what is away, as an older one.
        lie: given an order's outcomes, returns the ones to send instead.
        ordered: set when a message of this type has come.
    """

    def __init__(self, path: Path, version: int = wire.VERSION) -> None:
        self.path = path
        self._version = version
        self.agent = secrets.token_bytes(16)
        self.arenas: dict[int, FakeArena] = {}
        self.knows_absent = True
        self.obey = asyncio.Event()
        self.obey.set()
        self.lie: Callable[[Pages], Pages] = lambda outcomes: outcomes
        self.before_order: Callable[[wire.Message], None] = lambda order: None
        self.orders: list[wire.Type] = []
        self.arrived = asyncio.Condition()
        self.ended = asyncio.Event()
        self.welcome_descriptors = 0
        self._sock: socket.socket | None = None
        self._window: mmap.mmap | None = None
        self._seq = 0
        self._answers: dict[int, asyncio.Future[tuple[wire.Message, list[int]]]] = {}
        self._receiver: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect and take the welcome."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.connect(str(self.path))
        self._sock.setblocking(False)
        self.ended = asyncio.Event()
        self._receiver = asyncio.ensure_future(self._receive(self._sock))
        payload = wire.HELLO.pack(self.agent, os.getpid(), ALL_FEATURES)
        welcome, fds = await self.request(wire.Type.HELLO, 0, payload)
        size, flags, _ = wire.unpack(wire.WELCOME, welcome)
        self.welcome_descriptors = len(fds)
        assert len(fds) == 1 + (flags & 1)
        self._window = mmap.mmap(fds[0], size)
        for fd in fds:
            os.close(fd)

    async def open(
        self, name: str, data: Pages, domain: str = "default", pages: int | None = None
    ) -> FakeArena:
        """Open a new arena with these pages."""
        arena = FakeArena(self, len(self.arenas) + 1, name, domain, data.copy())
        await self.announce(arena, pages=pages)
        self.arenas[arena.number] = arena
        return arena

    async def announce(
        self,
        arena: FakeArena,
        *,
        extents: npt.NDArray[np.void] | None = None,
        fd: int | None = None,
        pages: int | None = None,
    ) -> None:
        """Announce an arena as it is, or with other extents or another descriptor."""
        runs = arena.extents() if extents is None else extents
        away = arena.away_records()
        wanted = wire.ArenaOpen(
            pages=arena.pages if pages is None else pages,
            lock=arena.lock,
            extents=runs.size,
            name=arena.name,
            domain=arena.domain,
            away=away.size,
            left=arena.left,
        )
        payload = wire.pack_arena_open(wanted, self._version)
        passed = arena.store if fd is None else fd
        asked = self.begin(
            wire.Type.ARENA_OPEN, arena.number, payload, [passed] if passed >= 0 else []
        )
        for low in range(0, runs.size, 2000):
            self.send(wire.Type.EXTENTS, arena.number, runs[low : low + 2000].tobytes())
        for low in range(0, away.size, wire.AWAY_PAGES_MAX):
            some = away[low : low + wire.AWAY_PAGES_MAX]
            self.send(wire.Type.AWAY_PAGES, arena.number, some.tobytes())
        opened, fds = await asked
        (arena.lock,) = wire.ARENA_OPENED.unpack_from(opened.payload)
        arena.domain = opened.payload[wire.ARENA_OPENED.size :].decode() or arena.domain
        if fds:
            assert arena.store < 0
            arena.store = fds[0]

    def begin(
        self, kind: wire.Type, arena: int, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> asyncio.Future[tuple[wire.Message, list[int]]]:
        """Send a request; return its answer to come."""
        self._seq += 1
        future = asyncio.get_running_loop().create_future()
        self._answers[self._seq] = future
        self.send(kind, arena, payload, self._seq, fds)
        return future

    async def request(
        self, kind: wire.Type, arena: int, payload: bytes = b""
    ) -> tuple[wire.Message, list[int]]:
        """Send a request and wait for its answer."""
        async with asyncio.timeout(10):
            return await self.begin(kind, arena, payload)

    def send(
        self,
        kind: wire.Type,
        arena: int,
        payload: bytes = b"",
        seq: int = 0,
        fds: Sequence[int] = (),
    ) -> None:
        """Send a message."""
        self.send_packet(wire.pack(kind, seq, arena, payload, self._version), fds)

    def send_packet(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send whatever bytes."""
        assert self._sock is not None
        socket.send_fds(self._sock, [packet], list(fds))

    async def account(self, arena: FakeArena) -> tuple[int, int]:
        """Return the merger's account of an arena: shared pages, saved bytes."""
        answer, _ = await self.request(wire.Type.ACCOUNT, arena.number)
        shared, saved = wire.unpack(wire.ACCOUNTED, answer)
        return shared, saved

    def fetch(self, arena: FakeArena, page: int, count: int = 1) -> None:
        """Touch away pages: ask for them, with those after the first."""
        self.send(wire.Type.FETCH, arena.number, wire.PAGE_RANGE.pack(page, count))

    async def evict(
        self, arena: FakeArena, page: int = 0, count: int | None = None
    ) -> tuple[int, ...]:
        """Have pages evicted, all if none are named; return the merger's counts."""
        payload = wire.PAGE_RANGE.pack(page, arena.pages if count is None else count)
        answer, _ = await self.request(wire.Type.EVICT_ARENA, arena.number, payload)
        return wire.unpack(wire.EVICTED, answer)

    def write(self, arena: FakeArena, page: int, data: bytes, count: int = 1) -> None:
        """Write to the start of pages as the application does; shared ones are restored first."""
        assert not arena.frozen, "the writer would have to wait"
        shared = bool(arena.slots[page : page + count].any())
        for number in range(page, page + count):
            arena.take_back(number)
            arena.absent[number] = False
            arena.data[number, : len(data)] = np.frombuffer(data, np.uint8)
        if shared and self._sock is not None:
            self.send(wire.Type.RESTORED, arena.number, wire.PAGE_RANGE.pack(page, count))

    async def close_arena(self, arena: FakeArena) -> None:
        """End the sharing of an arena; returns when the merger knows."""
        arena.leave_store()
        del self.arenas[arena.number]
        self.send(wire.Type.ARENA_CLOSE, arena.number)
        await self.flushed()

    async def flushed(self) -> None:
        """Return when the merger has handled all that was sent."""
        answer = self.begin(wire.Type.ACCOUNT, 0xFFFF)
        try:
            await answer
        except RefusedError as refused:
            assert refused.args[0] == errno.ENOENT

    async def until_ordered(self, kind: wire.Type, times: int = 1) -> None:
        """Wait until so many orders of a kind have come, obeyed or not."""
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: self.orders.count(kind) >= times)

    async def disconnect(self) -> None:
        """End the connection; memory, mappings and the store's descriptors stay."""
        if self._sock is None:
            return
        sock, self._sock = self._sock, None
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait({self._receiver})
        sock.close()
        self._answers.clear()

    async def die(self) -> None:
        """End as a process does: everything is closed."""
        await self.disconnect()
        for arena in self.arenas.values():
            if arena.store >= 0:
                os.close(arena.store)
        self.arenas.clear()

    async def _receive(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            readable = loop.create_future()
            loop.add_reader(sock, _resolve, readable)
            try:
                await readable
            finally:
                loop.remove_reader(sock)
            try:
                packet, fds, _, _ = socket.recv_fds(sock, wire.MESSAGE_MAX + 1, 4)
            except ConnectionError:
                packet, fds = b"", []
            if not packet:
                self.ended.set()
                for future in self._answers.values():
                    if not future.done():
                        future.set_exception(ConnectionError())
                        future.exception()
                return
            await self._handle(wire.parse(packet), fds)

    async def _handle(self, message: wire.Message, fds: list[int]) -> None:
        answer = self._answers.pop(message.seq, None) if message.type not in _ORDERS else None
        if answer is not None and message.type is wire.Type.REFUSED:
            (error,) = wire.REFUSED.unpack_from(message.payload)
            answer.set_exception(RefusedError(error, message.payload[4:].decode()))
            answer.exception()
        elif answer is not None:
            answer.set_result((message, fds))
        elif message.type in _ORDERS:
            async with self.arrived:
                self.orders.append(message.type)
                self.arrived.notify_all()
            self.before_order(message)
            await self.obey.wait()
            self._obey(message)

    def _obey(self, order: wire.Message) -> None:
        arena = self.arenas.get(order.arena)
        if arena is None:
            self._done(order, errno.ENOENT)
        elif order.type is wire.Type.READ:
            self._read(arena, order)
        elif order.type is wire.Type.COUNT:
            assert self._window is not None
            absent = int(np.count_nonzero(arena.absent))
            self._window[: wire.COUNTED_BYTES] = absent.to_bytes(wire.COUNTED_BYTES, "little")
            self._done(order, 0)
        elif order.type is wire.Type.REPLACE:
            self._done(order, 0, self.lie(self.replace(arena, order)))
        elif order.type is wire.Type.FREEZE:
            arena.frozen = wire.unpack(wire.FREEZE, order) != (0,)
            self._done(order, 0)
        elif order.type is wire.Type.LEAVE:
            self._done(order, self._leave(arena, order.payload))
        elif order.type in _AWAY_ORDERS:
            self._done(order, 0, self.lie(self.obey_away(arena, order)))
        else:
            page, count = wire.unpack(wire.PAGE_RANGE, order)
            for number in range(page, page + count):
                arena.take_back(number)
            self.send(wire.Type.RESTORED, arena.number, order.payload)
            self._done(order, 0)

    def _leave(self, arena: FakeArena, snapshot: bytes) -> int:
        if not arena.frozen:
            return errno.EBUSY
        arena.frozen = False
        arena.left = snapshot
        arena.slots[:] = 0
        arena.poisoned[:] = True
        arena.away.clear()
        return 0

    def _read(self, arena: FakeArena, order: wire.Message) -> None:
        ranges = wire.unpack_records(wire.RANGE, order).tolist()
        pages = [page + at for page, count in ranges for at in range(count)]
        assert self._window is not None
        assert pages == sorted(set(pages)) and pages[-1] < arena.pages
        assert len(pages) <= wire.READ_PAGES_MAX
        absent = arena.absent[pages]
        for number, page in enumerate(pages):
            low = number * wire.PAGE_SIZE
            absent[number] |= page in arena.away
            if not absent[number]:
                self._window[low : low + wire.PAGE_SIZE] = arena.page(page)
        self._done(order, 0, np.where(absent, Outcome.ABSENT, 0).astype(np.uint8))

    def obey_away(self, arena: FakeArena, order: wire.Message) -> Pages:
        """Carry out an order about away pages; return its outcomes."""
        if order.type is wire.Type.AWAY:
            records = np.frombuffer(order.payload, wire.AWAY).tolist()
            return np.array([self._away(arena, *record) for record in records], np.uint8)
        pages, rest = self._pages(arena, order)
        outcomes = []
        for number, page in enumerate(pages):
            data = self._window_page(number)
            if order.type is wire.Type.EVICT:
                digest = rest[number * 32 : (number + 1) * 32]
                outcomes.append(self._evict_page(arena, page, data, digest))
            elif arena.away.pop(page, None) is None:
                outcomes.append(Outcome.BUSY)
            else:
                arena.data[page] = np.frombuffer(data, np.uint8)
                arena.poisoned[page] = order.type is wire.Type.POISON
                outcomes.append(Outcome.MERGED)
        return np.array(outcomes, np.uint8)

    def _pages(self, arena: FakeArena, order: wire.Message) -> tuple[list[int], bytes]:
        """The pages that an order names in ranges, and what follows them in the payload."""
        size, rest = len(order.payload), b""
        if order.type is wire.Type.EVICT:
            # As many digests follow as the ranges have pages.
            for size in range(16, len(order.payload), 16):
                total = sum(np.frombuffer(order.payload[:size], wire.RANGE)["count"].tolist())
                if len(order.payload) - size == total * wire.DIGEST_BYTES:
                    break
            rest = order.payload[size:]
        ranges = np.frombuffer(order.payload[:size], wire.RANGE).tolist()
        pages = [page + at for page, count in ranges for at in range(count)]
        assert pages == sorted(set(pages)) and pages[-1] < arena.pages
        assert len(pages) <= wire.READ_PAGES_MAX or order.type is wire.Type.POISON
        return pages, rest

    def _window_page(self, number: int) -> bytes:
        assert self._window is not None
        low = number * wire.PAGE_SIZE % len(self._window)
        return self._window[low : low + wire.PAGE_SIZE]

    def _away(self, arena: FakeArena, page: int, digest: bytes) -> Outcome:
        if not arena.absent[page]:
            return Outcome.BUSY
        arena.absent[page] = False
        arena.away[page] = digest
        return Outcome.MERGED

    def _evict_page(self, arena: FakeArena, page: int, data: bytes, digest: bytes) -> Outcome:
        if arena.absent[page] or page in arena.away:
            return Outcome.ABSENT
        if arena.pinned[page]:
            return Outcome.PINNED
        if arena.page(page) != data:
            return Outcome.DIFFERS
        arena.away[page] = digest
        arena.slots[page] = 0
        arena.data[page] = 0xEE
        return Outcome.MERGED

    def replace(self, arena: FakeArena, order: wire.Message) -> Pages:
        """Carry out a REPLACE; return its outcomes."""
        runs, flags = wire.REPLACE.unpack_from(order.payload)
        extents = np.frombuffer(order.payload, wire.EXTENT, offset=wire.REPLACE.size)
        assert extents.size == runs
        outcomes = [
            self._replace_page(arena, page + at, slot + at if slot else 0, flags)
            for page, count, slot in extents.tolist()
            for at in range(count)
        ]
        assert len(outcomes) <= wire.REPLACE_PAGES_MAX
        return np.array(outcomes, np.uint8)

    def _replace_page(self, arena: FakeArena, page: int, slot: int, flags: int) -> Outcome:
        if arena.absent[page] and flags == wire.REPLACE_ABSENT and slot and self.knows_absent:
            assert arena.cloning
            arena.absent[page] = False
            arena.slots[page] = slot
            return Outcome.MERGED
        if arena.absent[page]:
            return Outcome.ABSENT
        if arena.slots[page]:
            return Outcome.BUSY
        if arena.away.pop(page, None) is not None:
            assert slot
            arena.slots[page] = slot
            return Outcome.MERGED
        if arena.pinned[page]:
            return Outcome.PINNED
        wanted = bytes(wire.PAGE_SIZE)
        if slot:
            assert (slot + 1) * wire.PAGE_SIZE <= os.fstat(arena.store).st_size
            wanted = os.pread(arena.store, wire.PAGE_SIZE, slot * wire.PAGE_SIZE)
        if arena.data[page].tobytes() != wanted:
            return Outcome.DIFFERS
        if slot:
            arena.slots[page] = slot
            arena.data[page] = 0xEE
        else:
            arena.absent[page] = True
        return Outcome.MERGED

    def _done(self, order: wire.Message, error: int, outcomes: Pages | None = None) -> None:
        sent = np.empty(0, np.uint8) if outcomes is None else outcomes
        payload = wire.DONE.pack(error, sent.size) + sent.tobytes()
        self.send(wire.Type.DONE, order.arena, payload, order.seq)


_AWAY_ORDERS = frozenset({wire.Type.AWAY, wire.Type.EVICT, wire.Type.FILL, wire.Type.POISON})
_ORDERS = _AWAY_ORDERS | {
    wire.Type.READ,
    wire.Type.REPLACE,
    wire.Type.RESTORE,
    wire.Type.COUNT,
    wire.Type.FREEZE,
    wire.Type.LEAVE,
}


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def random_pages(seed: int, pages: int) -> Pages:
    """Return pages that all differ, the same for the same seed."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (pages, wire.PAGE_SIZE), np.uint8)


async def _main(path: str, name: str, seed: str, pages: str, mode: str = "") -> None:
    agent = FakeMergingAgent(Path(path))
    await agent.connect()
    arena = await agent.open(name, random_pages(int(seed), int(pages)))

    def stall(order: wire.Message) -> None:
        if order.type is wire.Type.REPLACE:
            agent.replace(arena, order)
            agent.obey.clear()
            print("stalled", flush=True)

    if mode == "stall":
        agent.before_order = stall
    print("open", flush=True)
    await agent.ended.wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
