"""The index always comes to hold what the host holds, whatever happens to it in between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import grpc
import numpy as np
import pytest
from fakes.fake_agent import FakeAgent, FakeArena, random_pages
from fakes.fake_index import FakeIndex
from fakes.fake_merger import FakeMerger
from helpers.scanner_host import ScannerHost

from samepage.daemon.secrets import domain_id
from samepage.v1 import scanner_pb2
from samepage_scanner import publisher

DEFAULT = domain_id(b"a secret of the tests", "default")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(publisher, "_BACKOFF_MAX_SECONDS", 0.1)


@pytest.fixture
async def index() -> AsyncIterator[FakeIndex]:
    index = FakeIndex()
    await index.start()
    yield index
    await index.stop()


@pytest.fixture
async def host(index: FakeIndex) -> AsyncIterator[ScannerHost]:
    async with ScannerHost(index=index.address, merger_address="127.0.0.1:7001") as host:
        yield host


@pytest.fixture
async def agent(host: ScannerHost) -> AsyncIterator[FakeAgent]:
    agent = await FakeAgent.connect(host.directory)
    yield agent
    if not agent.hung_up.is_set():
        agent.close()


def content(*arenas: FakeArena) -> set[bytes]:
    return {
        arena.fingerprint(page)
        for arena in arenas
        for page in range(len(arena.memory))
        if not arena.absent[page] and arena.memory[page].any()
    }


async def scan(host: ScannerHost, times: int = 2) -> None:
    for _ in range(times):
        await host.service.passes.run_once()


async def test_stable_pages_are_published_once(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent
) -> None:
    pages = np.concatenate([random_pages(30, 1)] * 2 + [np.zeros((2, 4096), np.uint8)])
    arena = await agent.open("a", pages)
    arena.absent[0] = True
    await scan(host, 1)
    await index.settled()
    assert not index.held[DEFAULT]
    await scan(host, 1)
    await index.settled()
    assert index.held[DEFAULT] == content(arena)
    status = await host.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
    assert (status.published, status.index_connected) == (30, True)
    [announce] = index.announced
    assert (announce.host, announce.merger_address) == ("host-a", "127.0.0.1:7001")
    assert announce.epoch
    await scan(host)
    await index.settled()
    assert index.batches == 1


async def test_deltas_by_domain(host: ScannerHost, index: FakeIndex, agent: FakeAgent) -> None:
    first = await agent.open("a", random_pages(10, 1))
    second = await agent.open("b", random_pages(10, 1))
    other = await agent.open("c", random_pages(10, 1), "other")
    other_id = domain_id(b"a secret of the tests", "other")
    await scan(host)
    await index.settled()
    assert index.held == {DEFAULT: content(first), other_id: content(other)}
    first.memory[3] = random_pages(1, 2)[0]
    first.memory[4] = second.memory[4] = random_pages(1, 3)[0]
    await scan(host)
    await index.settled()
    assert index.held[DEFAULT] == content(first, second)
    assert len(index.held[DEFAULT]) == 11
    agent.close_arena(second)
    await scan(host)
    await index.settled()
    assert index.held[DEFAULT] == content(first)
    agent.close()
    await scan(host)
    await index.settled()
    assert not any(index.held.values())
    await scan(host, 1)
    assert not host.service.books.domains


async def test_pages_that_keep_changing_are_not_published(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(4, 1))
    for seed in range(2, 6):
        await scan(host, 1)
        arena.memory[0] = random_pages(1, seed)[0]
    await index.settled()
    expected = content(arena) - {arena.fingerprint(0)}
    assert index.held[DEFAULT] == expected


async def test_broken_stream_is_resumed(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not acknowledged is sent again, and nothing else."""
    monkeypatch.setattr(publisher, "BATCH_MAX", 10)
    arena = await agent.open("a", random_pages(25, 1))
    index.fail_batches = 2
    await scan(host)
    await index.settled()
    assert index.held[DEFAULT] == content(arena)
    assert len(index.announced) == 3
    assert len({announce.epoch for announce in index.announced}) == 1
    assert index.batches == 3 + 2
    status = await host.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
    assert status.published == 25


async def test_index_that_lost_its_data_gets_everything_anew(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(25, 1))
    await scan(host)
    await index.settled()
    index.lose()
    await index.settled()
    assert index.held[DEFAULT] == content(arena)
    assert len(index.announced) == 2


@pytest.mark.parametrize("keeps", [True, False])
async def test_changes_while_the_index_is_away(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent, keeps: bool
) -> None:
    first = await agent.open("a", random_pages(10, 1))
    second = await agent.open("b", random_pages(10, 2))
    await scan(host)
    await index.settled()
    await index.stop()
    first.memory[:5] = random_pages(5, 3)
    agent.close_arena(second)
    await scan(host)
    third = await agent.open("c", random_pages(10, 4))
    await scan(host)
    successor = FakeIndex(port=index.port)
    if keeps:
        successor.take_over(index)
    await successor.start()
    await successor.settled()
    assert successor.held[DEFAULT] == content(first, third)
    await successor.stop()


async def test_index_away_hurts_nobody() -> None:
    async with ScannerHost(index="127.0.0.1:1") as host:
        agent = await FakeAgent.connect(host.directory)
        merger = FakeMerger(host.directory, [agent])
        await merger.start()
        arena = await agent.open("a", np.concatenate([random_pages(4, 1)] * 2))
        await scan(host)
        assert (await agent.share(arena))["shared"] == 8
        status = await host.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
        assert not status.index_connected
        with pytest.raises(grpc.aio.AioRpcError, match="the index is away") as away:
            await host.api.GetOverlap(scanner_pb2.GetOverlapRequest())
        assert away.value.code() is grpc.StatusCode.UNAVAILABLE
        agent.close()
        await merger.stop()


async def test_no_index_at_all() -> None:
    async with ScannerHost() as host:
        with pytest.raises(grpc.aio.AioRpcError, match="no index") as away:
            await host.api.GetOverlap(scanner_pb2.GetOverlapRequest())
        assert away.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_overlap_counts_by_host(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "LOOKUP_MAX", 7)
    arena = await agent.open("a", np.concatenate([random_pages(20, 1), random_pages(10, 1)]))
    await scan(host)
    await index.settled()
    index.others = {
        "host-b": {arena.fingerprint(page) for page in range(12)},
        "host-c": {arena.fingerprint(page) for page in range(5, 20)},
        "host-d": set(),
    }
    overlap = await host.api.GetOverlap(scanner_pb2.GetOverlapRequest())
    assert overlap.distinct_pages == 20
    assert [(host.host, host.pages) for host in overlap.hosts] == [("host-c", 15), ("host-b", 12)]


async def test_overlap_of_one_arena(host: ScannerHost, index: FakeIndex, agent: FakeAgent) -> None:
    first = await agent.open("a", random_pages(20, 1))
    await agent.open("b", random_pages(30, 2))
    await agent.open("a", random_pages(40, 3), "other")
    await scan(host)
    await index.settled()
    index.others = {"host-b": {first.fingerprint(page) for page in range(12)}}
    overlap = await host.api.GetOverlap(scanner_pb2.GetOverlapRequest(arena="a"))
    assert overlap.distinct_pages == 20
    assert [(host.host, host.pages) for host in overlap.hosts] == [("host-b", 12)]
    overlap = await host.api.GetOverlap(scanner_pb2.GetOverlapRequest(arena="b"))
    assert (overlap.distinct_pages, len(overlap.hosts)) == (30, 0)
    overlap = await host.api.GetOverlap(scanner_pb2.GetOverlapRequest(domain="other"))
    assert overlap.distinct_pages == 40
    with pytest.raises(grpc.aio.AioRpcError, match="no arena 'c' in domain 'default'"):
        await host.api.GetOverlap(scanner_pb2.GetOverlapRequest(arena="c"))


async def test_overlap_of_a_sample_speaks_for_all(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(400, 1))
    policy = scanner_pb2.ScannerPolicy(sampling_bits=2)
    await host.api.SetPolicy(scanner_pb2.SetScannerPolicyRequest(policy=policy))
    await scan(host)
    await index.settled()
    sample = {one for one in content(arena) if int.from_bytes(one, "big") % 4 == 0}
    index.others = {"host-b": sample}
    overlap = await host.api.GetOverlap(scanner_pb2.GetOverlapRequest())
    assert (overlap.distinct_pages, overlap.hosts[0].pages) == (400, 4 * len(sample))


def holds(index: FakeIndex, wanted: set[bytes]) -> bool:
    return index.held[DEFAULT] == wanted


async def test_sampling_changes_while_the_index_listens(
    host: ScannerHost, index: FakeIndex, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(200, 1))
    await scan(host)
    await index.settled()
    assert index.held[DEFAULT] == content(arena)
    for bits in (2, 4, 1, 0):
        policy = scanner_pb2.ScannerPolicy(sampling_bits=bits)
        await host.api.SetPolicy(scanner_pb2.SetScannerPolicyRequest(policy=policy))
        wanted = {one for one in content(arena) if int.from_bytes(one, "big") % (1 << bits) == 0}
        assert wanted
        await index.until(partial(holds, index, wanted))
        status = await host.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
        assert status.published == len(wanted)
