"""Daemons and agents one protocol version apart share like any others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from application import Application
from fakes.fake_agent import FakeAgent
from fakes.fake_agent import random_pages as scanner_pages
from fakes.fake_merger import FakeMerger
from fakes.fake_merging_agent import FakeMergingAgent, random_pages
from helpers.merger_host import DOMAIN, MergerHost, store_directory
from helpers.scanner_host import ScannerHost

from samepage.daemon import wire
from samepage.daemon.wire import Outcome
from samepage_merger.merging import RUN

PAGES = 64


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def merger(tmp_path: Path, store: Path) -> AsyncIterator[MergerHost]:
    host = MergerHost(tmp_path, store)
    yield host
    host.stop()


async def test_agents_of_both_versions_share_with_each_other(merger: MergerHost) -> None:
    agents = [FakeMergingAgent(merger.path, version) for version in wire.VERSIONS]
    data = random_pages(1, PAGES)
    for agent in agents:
        await agent.connect()
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    outcomes = await merger.merge_all(*arenas)
    assert outcomes[:, Outcome.MERGED].tolist() == [PAGES, PAGES]
    merger.assert_exact(*agents)
    assert merger.agents.older() == 1
    for agent in agents:
        await agent.die()


async def test_scattered_pages_of_an_older_agent_merge(
    merger: MergerHost,
) -> None:
    data = random_pages(1, 900)
    for version in wire.VERSIONS:
        agents = [FakeMergingAgent(merger.path, version), FakeMergingAgent(merger.path)]
        for agent in agents:
            await agent.connect()
        leader = await agents[0].open("leader", data)
        follower = await agents[1].open("follower", data)
        runs = [(0, 1, 0, 0, 600), *((0, 1, page, page, 1) for page in range(601, 900, 2))]
        outcomes = await merger.merge([leader, follower], runs)
        assert outcomes[:, Outcome.MERGED].tolist() == [750, 750]
        assert leader.view() == follower.view() == data.tobytes()
        merger.assert_exact(*agents)
        for agent in agents:
            await agent.die()
        await merger.settled()


async def test_an_agent_one_version_back_is_scanned() -> None:
    async with ScannerHost() as host:
        agents = [await FakeAgent.connect(host.directory, version=v) for v in wire.VERSIONS]
        fake = FakeMerger(host.directory, agents)
        await fake.start()
        data = scanner_pages(PAGES, 1)
        for number, agent in enumerate(agents):
            await agent.open(f"arena-{number}", data)
        for agent in agents:
            assert (await agent.share(agent.arenas[1]))["shared"] == PAGES
        for agent in agents:
            agent.close()
        await fake.stop()


@pytest.mark.needs("move", "wp_tmpfs", "remap")
async def test_the_library_shares_with_a_merger_one_version_back(
    merger: MergerHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merger as it was: it refuses what is newer, and the library says HELLO again."""
    monkeypatch.setattr(wire, "VERSIONS", (2,))
    monkeypatch.setattr(wire, "VERSION", 2)

    applications = [await asyncio.to_thread(Application, tmp_path) for _ in range(2)]
    for number, application in enumerate(applications):
        await asyncio.to_thread(application.call, "create", f"arena-{number}", PAGES)
        await asyncio.to_thread(application.call, "fill", f"arena-{number}", 7)
    arenas = sorted(merger.domain.arenas, key=lambda arena: arena.name)
    keys = [(arena.agent, arena.number) for arena in arenas]
    runs = np.array([(0, 1, 0, 0, PAGES)], RUN)
    async for _ in merger.engine.merge(DOMAIN, keys, runs.tobytes()):
        pass
    assert [arena.map.shared for arena in arenas] == [PAGES, PAGES]
    for number, application in enumerate(applications):
        stats = await asyncio.to_thread(application.call, "stats", f"arena-{number}")
        assert stats["shared"] == PAGES
        await asyncio.to_thread(application.end)
