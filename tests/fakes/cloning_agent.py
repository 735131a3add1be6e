"""An agent that makes clones: FakeMergingAgent, and the part of the protocol that they take."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, Pages, RefusedError

from samepage.daemon import wire

_FIRST_SEQ = 1 << 20


class CloningAgent(FakeMergingAgent):
    """One agent.

    Attributes:
        mappings: how many more pages may map slots.
        told: what CLONING and CLONED said: pages, local, fetched, missing; CLONED also the freeze.
        sealed: the arenas of which CLONED said that they are.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.mappings = 1 << 30
        self.told: list[tuple[int, ...]] = []
        self.sealed: set[int] = set()
        self._news: dict[int, asyncio.Queue[wire.Message]] = {}
        self._next_seq = _FIRST_SEQ

    async def clone(self, wanted: wire.Clone) -> FakeArena:
        """Have an arena cloned, to the end.

        Raises:
            RefusedError: the merger refused, and the arena was dropped.
        """
        number = len(self.arenas) + 1
        seq = self.ask(wanted, number)
        pages, *_ = await self.news(seq)
        arena = await self.make(wanted, number, pages)
        try:
            await self.until_cloned(seq)
        except RefusedError:
            await self.close_arena(arena)
            raise
        return arena

    def ask(self, wanted: wire.Clone, number: int) -> int:
        """Send CLONE; return its number."""
        self._next_seq += 1
        self._news[self._next_seq] = asyncio.Queue()
        self.send(wire.Type.CLONE, number, wire.pack_clone(wanted), self._next_seq)
        return self._next_seq

    async def make(self, wanted: wire.Clone, number: int, pages: int) -> FakeArena:
        """Make the arena: all of it is absent."""
        data = np.zeros((pages, wire.PAGE_SIZE), np.uint8)
        arena = FakeArena(self, number, wanted.name, wanted.domain, data)
        arena.absent[:] = True
        arena.cloning = True
        self.arenas[number] = arena
        await self.announce(arena)
        return arena

    async def until_cloned(self, seq: int) -> tuple[int, ...]:
        """Wait for CLONED; return what it says.

        Raises:
            RefusedError: REFUSED came.
        """
        while True:
            counts = await self.news(seq)
            if len(counts) == 5:
                return counts

    async def news(self, seq: int) -> tuple[int, ...]:
        """Return what the next CLONING or CLONED says.

        Raises:
            RefusedError: REFUSED came.
        """
        async with asyncio.timeout(20):
            message = await self._news[seq].get()
        if message.type is wire.Type.REFUSED:
            (error,) = wire.REFUSED.unpack_from(message.payload)
            raise RefusedError(error, message.payload[wire.REFUSED.size :].decode())
        layout = wire.CLONED if message.type is wire.Type.CLONED else wire.CLONING
        counts = wire.unpack(layout, message)
        if message.type is wire.Type.CLONED:
            self.arenas[message.arena].cloning = False
            counts, sealed = counts[:-1], counts[-1]
            self.sealed |= {message.arena} if sealed else set()
        self.told.append(counts)
        return counts

    def replace(self, arena: FakeArena, order: wire.Message) -> Pages:
        """Carry out a REPLACE, while mappings are left."""
        if self.mappings > 0:
            outcomes = super().replace(arena, order)
            self.mappings -= outcomes.size
            return outcomes
        extents = np.frombuffer(order.payload, wire.EXTENT, offset=wire.REPLACE.size)
        return np.full(int(extents["count"].sum()), wire.Outcome.NO_MAPPING, np.uint8)

    async def _handle(self, message: wire.Message, fds: list[int]) -> None:
        if message.seq in self._news and message.type in _NEWS:
            self._news[message.seq].put_nowait(message)
        else:
            await super()._handle(message, fds)


_NEWS = (wire.Type.CLONING, wire.Type.CLONED, wire.Type.REFUSED)
