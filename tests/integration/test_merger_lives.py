"""Random lives of agents and mergers: whatever happens, bytes stay and the books are exact."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, random_pages
from helpers.merger_host import MergerHost, store_directory

from samepage.daemon.wire import PAGE_SIZE

STEPS = 150
UNIQUE = random_pages(1, 60)


class Life:
    """A host with agents, and what every page must read as."""

    def __init__(self, directory: Path, store: Path, seed: int) -> None:
        self.directory = directory
        self.store = store
        self.random = np.random.default_rng(seed)
        self.host = MergerHost(directory, store)
        self.agents: list[FakeMergingAgent] = []
        self.away: list[FakeMergingAgent] = []
        self.expected: dict[FakeArena, list[bytes]] = {}
        self.named = 0

    def arenas(self, agents: list[FakeMergingAgent]) -> list[FakeArena]:
        return [arena for agent in agents for arena in agent.arenas.values()]

    def pick(self, agents: list[FakeMergingAgent]) -> FakeMergingAgent | None:
        return agents[int(self.random.integers(len(agents)))] if agents else None

    async def step(self) -> None:
        """Do one thing at random."""
        actions = [self.open, self.merge, self.merge, self.write, self.write, self.close]
        actions += [self.join, self.break_off, self.come_back, self.die, self.die_away]
        weights = np.array([6, 9, 9, 6, 6, 3, 4, 3, 5, 1, 1], float)
        chosen = self.random.choice(len(actions), p=weights / weights.sum())
        await actions[chosen]()

    async def join(self) -> None:
        if len(self.agents) + len(self.away) < 5:
            agent = FakeMergingAgent(self.host.path)
            agent.before_order = lambda order: self.write_some(agent, 1)
            await agent.connect()
            self.agents.append(agent)

    async def open(self) -> None:
        agent = self.pick(self.agents)
        if agent is not None and len(agent.arenas) < 3:
            self.named += 1
            number = self.named
            data = UNIQUE[self.random.integers(0, len(UNIQUE), int(self.random.integers(1, 300)))]
            arena = FakeArena(agent, number, f"arena-{number}", "default", data.copy())
            await agent.announce(arena)
            agent.arenas[number] = arena
            self.expected[arena] = [page.tobytes() for page in data]

    async def close(self) -> None:
        agent = self.pick(self.agents)
        if agent is not None and agent.arenas:
            arena = agent.arenas[min(agent.arenas)]
            del self.expected[arena]
            await agent.close_arena(arena)

    async def merge(self) -> None:
        arenas = self.arenas(self.agents)
        if not arenas:
            return
        runs = []
        where: dict[bytes, tuple[int, int]] = {}
        for row, arena in enumerate(arenas):
            for page, data in enumerate(self.expected[arena]):
                first = where.setdefault(data, (row, page))
                if first != (row, page) and self.random.random() < 0.8:
                    runs.append((first[0], row, first[1], page, 1))
        if runs:
            await self.host.merge(arenas, runs)

    def write_some(self, agent: FakeMergingAgent, count: int) -> None:
        arenas = list(agent.arenas.values())
        if not arenas:
            return
        for _ in range(count):
            arena = arenas[int(self.random.integers(len(arenas)))]
            page = int(self.random.integers(arena.pages))
            data = UNIQUE[int(self.random.integers(len(UNIQUE)))].tobytes()
            self.expected[arena][page] = data
            agent.write(arena, page, data)

    async def write(self) -> None:
        agent = self.pick(self.agents + self.away)
        if agent is not None:
            self.write_some(agent, 10)

    async def break_off(self) -> None:
        agent = self.pick(self.agents)
        if agent is not None:
            await agent.disconnect()
            self.agents.remove(agent)
            self.away.append(agent)

    async def come_back(self) -> None:
        agent = self.pick(self.away)
        if agent is not None:
            await agent.connect()
            for arena in agent.arenas.values():
                await agent.announce(arena)
            self.away.remove(agent)
            self.agents.append(agent)

    async def die(self) -> None:
        await self.end(self.agents)

    async def die_away(self) -> None:
        await self.end(self.away)

    async def end(self, some: list[FakeMergingAgent]) -> None:
        agent = self.pick(some)
        if agent is not None:
            for arena in agent.arenas.values():
                del self.expected[arena]
            await agent.die()
            some.remove(agent)

    async def restart(self) -> None:
        """The merger is killed and started again; everyone is away at first."""
        self.host.crash()
        self.host = MergerHost(self.directory, self.store)
        for agent in self.agents:
            await agent.disconnect()
        self.away += self.agents
        self.agents.clear()

    async def check(self) -> None:
        """Every byte is what was written, and, when all are there, the books are exact."""
        for agent in self.agents:
            await agent.flushed()
        async with asyncio.timeout(5):
            while len(self.host.agents) != len(self.agents):
                await asyncio.sleep(0)
        self.host.janitor.run_once()
        for arena, pages in self.expected.items():
            assert arena.view() == b"".join(pages)
        if not self.away:
            await self.host.settled()
            self.host.assert_exact(*self.agents)


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.mark.parametrize("seed", range(4))
async def test_random_lives(tmp_path: Path, store: Path, seed: int) -> None:
    life = Life(tmp_path, store, seed)
    shared = 0
    for step in range(STEPS):
        if step % 40 == 39:
            await life.restart()
        await life.step()
        await life.check()
        shared += sum(int((arena.slots != 0).sum()) for arena in life.expected)
    while life.away:
        await life.come_back()
    await life.check()
    assert shared > 1000
    assert life.host.domains.resident_bytes() <= len(UNIQUE) * PAGE_SIZE * 4
    for agent in list(life.agents):
        await agent.die()
        life.agents.remove(agent)
    life.expected.clear()
    await life.check()
    assert life.host.domains.resident_bytes() == 0
    life.host.stop()
    gc.collect()
