"""Merges that could not be undone within the host's memory are refused, and say so."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, random_pages
from helpers.merger_host import MergerHost, store_directory
from structlog.testing import capture_logs

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage.v1 import merger_pb2
from samepage_merger.config import Config
from samepage_merger.orders import NO_HEADROOM

PAGES = 1000


class Memory:
    """The host's memory, as a test has it."""

    def __init__(self) -> None:
        self.left = 300 * PAGE_SIZE
        self.looks = 0

    def available(self) -> int:
        self.looks += 1
        return self.left


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
async def host(tmp_path: Path, memory: Memory) -> AsyncIterator[MergerHost]:
    with store_directory() as store:
        config = Config(node="test", headroom_percent=100.0)
        host = MergerHost(tmp_path, store, config=config, available=memory.available)
        yield host
        host.stop()
        gc.collect()


@pytest.fixture
async def agents(host: MergerHost) -> AsyncIterator[list[FakeMergingAgent]]:
    agents = [FakeMergingAgent(host.path) for _ in range(3)]
    for agent in agents:
        await agent.connect()
    yield agents
    for agent in agents:
        await agent.die()


async def open_all(agents: list[FakeMergingAgent]) -> list[FakeArena]:
    data = random_pages(1, PAGES)
    return [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]


async def test_pages_beyond_the_headroom_stay_private(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    outcomes = await host.merge_all(*arenas[:2])
    assert outcomes[:, Outcome.MERGED].tolist() == [300, 300]
    assert outcomes[:, NO_HEADROOM].tolist() == [0, PAGES - 300]
    assert outcomes.sum() == 600 + PAGES - 300
    assert host.headroom.left_bytes() == 0 and host.headroom.refused == PAGES - 300
    assert all(arena.view() == arenas[2].view() for arena in arenas)
    host.assert_exact(*agents)


async def test_a_third_sharer_needs_headroom_and_no_slot(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    await host.merge(arenas, [(0, 1, 0, 0, 200)])
    outcomes = await host.merge(arenas, [(0, 2, 0, 0, 200)])
    assert outcomes[2].tolist()[:1] == [100] and outcomes[2, NO_HEADROOM] == 100
    assert host.domains.saved_pages() == 300
    host.assert_exact(*agents)


async def test_writes_make_room_for_other_merges(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    await host.merge_all(*arenas[:2])
    agents[0].write(arenas[0], 0, b"own", 50)
    await agents[0].flushed()
    assert host.domains.saved_pages() == 250
    outcomes = await host.merge(arenas, [(1, 2, 600, 600, 400)])
    assert outcomes[2, Outcome.MERGED] == 50
    host.assert_exact(*agents)


async def test_the_share_of_what_is_saved_is_a_policy(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    host.policies.change(merger_pb2.MergerPolicy(headroom_percent=50.0))
    assert (await host.merge_all(*arenas[:2]))[1, Outcome.MERGED] == 600
    host.policies.change(merger_pb2.MergerPolicy(memory_ceiling_bytes=350 * PAGE_SIZE))
    memory.left *= 1000
    assert host.headroom.available_bytes(0) == 350 * PAGE_SIZE
    assert (await host.merge_all(*arenas[:2]))[1, Outcome.MERGED] == 100
    host.policies.change(merger_pb2.MergerPolicy(headroom_percent=0.0))
    assert (await host.merge_all(*arenas[:2]))[1, Outcome.MERGED] == 300
    host.assert_exact(*agents)


async def test_memory_is_read_by_time_and_not_by_page(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    memory.left = 1 << 40
    runs = [(0, 1, page, page, 1) for page in range(0, PAGES, 2)]
    assert (await host.merge(arenas, runs))[1, Outcome.MERGED] == PAGES // 2
    assert memory.looks <= 2


async def test_a_cancelled_merge_gives_its_headroom_back(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    agents[1].obey.clear()
    merging = asyncio.ensure_future(host.merge_all(*arenas[:2]))
    await agents[1].until_ordered(wire.Type.REPLACE)
    merging.cancel()
    await asyncio.wait({merging})
    agents[1].obey.set()
    await agents[1].flushed()
    memory.left = 1 << 40
    assert host.headroom.available_bytes(0) == memory.left
    outcomes = await host.merge_all(*arenas[:2])
    assert outcomes[1, NO_HEADROOM] == 0
    assert host.headroom.left_bytes() == (1 << 40) - PAGES * PAGE_SIZE


async def test_the_refusal_is_logged_once_a_minute(
    host: MergerHost, agents: list[FakeMergingAgent], memory: Memory
) -> None:
    arenas = await open_all(agents)
    with capture_logs() as logs:
        for _ in range(3):
            await host.merge_all(*arenas)
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert len(warnings) == 1 and "headroom_percent" in warnings[0]["event"]
    assert warnings[0]["available_bytes"] == 300 * PAGE_SIZE
