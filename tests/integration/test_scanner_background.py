"""Passes that nobody asked for: when they come, what they merge, and how they give way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fakes.fake_agent import FakeAgent, random_pages
from fakes.fake_merger import FakeMerger
from helpers.scanner_host import ScannerHost

from samepage.daemon.wire import Message


@pytest.fixture
async def host() -> AsyncIterator[ScannerHost]:
    async with ScannerHost(interval_seconds=1000.0, interval_max_seconds=3000.0) as host:
        yield host


@pytest.fixture
async def agent(host: ScannerHost) -> AsyncIterator[FakeAgent]:
    agent = await FakeAgent.connect(host.directory)
    yield agent
    agent.close()


@pytest.fixture
async def merger(host: ScannerHost, agent: FakeAgent) -> AsyncIterator[FakeMerger]:
    merger = FakeMerger(host.directory, [agent])
    await merger.start()
    await host.service.merger.ready()
    yield merger
    await merger.stop()


async def scan(host: ScannerHost, times: int = 1) -> None:
    for _ in range(times):
        await host.service.passes.run_once()


async def test_pages_merge_once_they_stood_still(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    first = await agent.open("a", random_pages(10, 1))
    second = await agent.open("b", random_pages(10, 1))
    await scan(host)
    first.memory[9] = second.memory[9] = random_pages(1, 2)[0]
    assert not merger.runs
    await scan(host)
    assert merger.runs == [("a", 0, "b", 0, 9)]
    await scan(host)
    assert merger.runs[1:] == [("a", 9, "b", 9, 1)]
    await scan(host, 3)
    assert len(merger.runs) == 2


async def test_merger_is_not_asked_when_nothing_changes(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    """Pages that keep changing are no reason to match again."""
    arenas = [await agent.open(name, random_pages(10, 1)) for name in "ab"]
    await scan(host, 3)
    merger.requested.clear()
    for seed in range(2, 6):
        arenas[0].memory[0] = random_pages(1, seed)[0]
        arenas[0].shared[0] = False
        await scan(host)
    assert not merger.requested.is_set()


async def test_what_a_merger_missed_is_merged_when_it_is_back(
    host: ScannerHost, agent: FakeAgent
) -> None:
    for name in "ab":
        await agent.open(name, random_pages(10, 1))
    await scan(host, 4)
    merger = FakeMerger(host.directory, [agent])
    await merger.start()
    await host.service.merger.ready()
    await scan(host)
    assert merger.runs == [("a", 0, "b", 0, 10)]
    await merger.stop()


async def test_pause_grows_while_nothing_happens(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    passes = host.service.passes
    arena = await agent.open("a", random_pages(10, 1))
    pauses = []
    for _ in range(4):
        await scan(host)
        pauses.append(passes.interval)
    assert pauses == [1000, 2000, 3000, 3000]
    arena.memory[0] = 1
    await scan(host)
    assert passes.interval == 1000
    await scan(host)
    assert passes.interval == 2000
    await agent.open("b", random_pages(10, 2))
    assert passes.interval == 1000


async def test_passes_run_by_themselves() -> None:
    async with ScannerHost(interval_seconds=0.02, cpu_percent=100.0) as host:
        agent = await FakeAgent.connect(host.directory)
        merger = FakeMerger(host.directory, [agent])
        await merger.start()
        for name in "ab":
            await agent.open(name, random_pages(10, 1))
        async with asyncio.timeout(10):
            await merger.requested.wait()
        agent.close()
        await merger.stop()


async def test_background_pass_gives_way_to_shares(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    for number in range(5):
        await agent.open(str(number), random_pages(1, number))
    owed: list[Message] = []
    agent.on_order = owed.append
    background = asyncio.create_task(host.service.passes.run_once())
    await agent.ordered.wait()
    other = await FakeAgent.connect(host.directory)
    merger.agents.append(other)
    arena = await other.open("share", random_pages(4, 9), "other")
    share = asyncio.create_task(other.share(arena))
    await other.open("later", random_pages(1, 9), "other")
    await other.open("latest", random_pages(1, 9), "other")
    agent.answer(owed[0])
    await background
    assert len(owed) == 1
    assert (await share)["pages"] == 4
    assert len(owed) == 1
    other.close()
