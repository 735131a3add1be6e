"""Cold pages go to the merger to be evicted; by default none does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fakes.fake_agent import FakeAgent, random_pages
from fakes.fake_merger import FakeMerger
from helpers.scanner_host import ScannerHost

from samepage.v1 import scanner_pb2

PAGES = 600


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


async def test_pages_that_stand_still_are_evicted_once(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    await agent.open("a", random_pages(PAGES, 1))
    passes = host.service.passes
    for _ in range(3):
        await passes.run_once()
    assert merger.evicted == []
    policy = scanner_pb2.ScannerPolicy(evict_idle_seconds=0.01)
    await host.api.SetPolicy(scanner_pb2.SetScannerPolicyRequest(policy=policy))

    async def pass_until_evicted() -> None:
        while not merger.evicted:
            await passes.run_once()

    await asyncio.wait_for(pass_until_evicted(), 20)
    for _ in range(3):
        await passes.run_once()
    assert merger.evicted == [("a", 0, PAGES)]
    assert passes.evictions.evicted == PAGES
