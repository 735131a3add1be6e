"""Passes over agents that track writes cost what changed; what keeps changing is left alone."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator

import pytest
from fakes.fake_agent import FakeAgent, FakeArena, random_pages
from fakes.fake_merger import FakeMerger
from helpers.scanner_host import ScannerHost

from samepage.daemon import wire
from samepage.daemon.wire import Message, Type
from samepage.v1.scanner_pb2 import ScannerPolicy
from samepage_scanner.attention import BLOCK_PAGES


@pytest.fixture
async def host() -> AsyncIterator[ScannerHost]:
    async with ScannerHost(recheck_seconds=1e7) as host:
        yield host


@pytest.fixture
async def agent(host: ScannerHost) -> AsyncIterator[FakeAgent]:
    agent = await FakeAgent.connect(host.directory, tracks=True)
    yield agent
    if not agent.hung_up.is_set():
        agent.close()


@pytest.fixture
async def merger(host: ScannerHost, agent: FakeAgent) -> AsyncIterator[FakeMerger]:
    merger = FakeMerger(host.directory, [agent])
    await merger.start()
    await host.service.merger.ready()
    yield merger
    await merger.stop()


async def scan(host: ScannerHost, agent: FakeAgent, times: int = 1) -> list[tuple[int, int]]:
    """Passes; the ranges that were fingerprinted in them."""
    agent.orders.clear()
    for _ in range(times):
        await host.service.passes.run_once()
    return fingerprinted(agent)


def fingerprinted(agent: FakeAgent) -> list[tuple[int, int]]:
    return [
        (first, count)
        for order in agent.orders
        if order.type is Type.FINGERPRINT
        for first, count in wire.unpack_records(wire.RANGE, order).tolist()
    ]


def asked(agent: FakeAgent) -> list[tuple[int, int]]:
    """The ranges of the CHANGED orders."""
    return [
        (first, count)
        for order in agent.orders
        if order.type is Type.CHANGED
        for first, count in [wire.unpack(wire.PAGE_RANGE, order)]
    ]


def write(arena: FakeArena, *pages: int, seed: int = 9) -> None:
    arena.memory[list(pages)] = random_pages(len(pages), seed)
    arena.shared[list(pages)] = False


async def stable(host: ScannerHost) -> int:
    return sum(arena.pages.count_stable() for arena in host.service.books.arenas())


async def test_only_what_was_written_is_fingerprinted(host: ScannerHost, agent: FakeAgent) -> None:
    arena = await agent.open("a", random_pages(100, 1))
    assert await scan(host, agent) == [(0, 100)]
    assert await scan(host, agent) == []
    write(arena, 3, 50, 51, 99)
    assert await scan(host, agent) == [(3, 1), (50, 2), (99, 1)]
    assert len(agent.orders) == 2
    assert await scan(host, agent) == []


async def test_pages_that_are_not_named_stand_still(host: ScannerHost, agent: FakeAgent) -> None:
    arena = await agent.open("a", random_pages(10, 1))
    arena.absent[0] = True
    await scan(host, agent)
    assert await stable(host) == 0
    write(arena, 3)
    await scan(host, agent)
    assert await stable(host) == 8
    await scan(host, agent)
    assert await stable(host) == 9


async def test_many_ranges_and_answers_in_parts(host: ScannerHost, agent: FakeAgent) -> None:
    arena = await agent.open("a", random_pages(300, 1))
    await scan(host, agent, 2)
    agent.ranges_max = 7
    write(arena, *range(0, 300, 2))
    assert await scan(host, agent) == [(page, 1) for page in range(0, 300, 2)]
    assert [order.type for order in agent.orders].count(Type.FINGERPRINT) == 1
    assert await scan(host, agent) == []


async def test_merged_pages_are_looked_at_again(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    """The agent does not name them: the scanner knows by itself."""
    for name in "ab":
        await agent.open(name, random_pages(10, 1))
    await scan(host, agent, 2)
    assert merger.runs == [("a", 0, "b", 0, 10)]
    assert await scan(host, agent) == [(0, 10), (0, 10)]
    assert await scan(host, agent, 3) == []
    assert len(merger.runs) == 1


async def test_written_shared_page_merges_again(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    first = await agent.open("a", random_pages(10, 1))
    second = await agent.open("b", random_pages(10, 1))
    await scan(host, agent, 4)
    write(first, 5)
    await scan(host, agent)
    write(second, 5)
    await scan(host, agent, 3)
    assert merger.runs[1:] == [("a", 5, "b", 5, 1)]


async def test_share_sees_every_write_and_resting_blocks_too(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    first = await agent.open("a", random_pages(10, 1))
    second = await agent.open("b", random_pages(10, 2))
    for seed in range(10, 16):
        write(second, 4, seed=seed)
        await scan(host, agent)
    write(second, 4, seed=16)
    assert await scan(host, agent) == []
    second.memory[4:8] = first.memory[4:8]
    assert (await agent.share(second))["merged"] == 4


async def test_blocks_that_keep_changing_are_asked_for_less_and_less(
    host: ScannerHost, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(2 * BLOCK_PAGES, 1))
    await scan(host, agent)
    seen = []
    for seed in range(40):
        write(arena, 3, seed=seed)
        assert await scan(host, agent) in ([], [(3, 1)])
        if asked(agent) == [(0, 2 * BLOCK_PAGES)]:
            seen.append(seed)
        else:
            assert asked(agent) == [(BLOCK_PAGES, BLOCK_PAGES)]
    assert seen == [0, 1, 4, 9, 18, 35]


async def test_block_that_stops_changing_is_looked_at_as_ever(
    host: ScannerHost, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(BLOCK_PAGES, 1))
    await scan(host, agent)
    for seed in range(2):
        write(arena, 3, seed=seed)
        await scan(host, agent)
    await scan(host, agent, 3)
    assert asked(agent) == [(0, BLOCK_PAGES)]
    for _ in range(3):
        await scan(host, agent)
        assert asked(agent) == [(0, BLOCK_PAGES)]
    assert await stable(host) == BLOCK_PAGES


async def test_nothing_rests_when_the_policy_says_so(agent: FakeAgent, host: ScannerHost) -> None:
    arena = await agent.open("a", random_pages(10, 1))
    host.service.policies.change(ScannerPolicy(rest_passes_max=0))
    await scan(host, agent)
    for seed in range(8):
        write(arena, 3, seed=seed)
        assert await scan(host, agent) == [(3, 1)]


async def test_agents_without_tracking_rest_too(host: ScannerHost) -> None:
    agent = await FakeAgent.connect(host.directory)
    arena = await agent.open("a", random_pages(2 * BLOCK_PAGES, 1))
    await scan(host, agent)
    seen = []
    for seed in range(12):
        write(arena, 3, seed=seed)
        if await scan(host, agent) == [(0, 2 * BLOCK_PAGES)]:
            seen.append(seed)
        else:
            assert fingerprinted(agent) == [(BLOCK_PAGES, BLOCK_PAGES)]
    assert seen == [0, 1, 4, 9]
    agent.close()


async def test_everything_is_looked_at_anew_now_and_then(
    host: ScannerHost, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(100, 1))
    await scan(host, agent, 2)
    arena.absent[:50] = True
    assert await scan(host, agent) == []
    host.service.policies.change(ScannerPolicy(recheck_seconds=1.0))
    looker = host.service.passes.looker
    looker.checked_at -= 1.0
    assert await scan(host, agent) == [(0, 100)]
    assert await stable(host) == 50


async def test_arena_whose_writes_cannot_be_tracked(host: ScannerHost, agent: FakeAgent) -> None:
    await agent.open("a", random_pages(100, 1))
    await agent.open("b", random_pages(50, 2))

    def answer(order: Message) -> None:
        if order.type is Type.CHANGED and order.arena == 1:
            agent.done(order, error=errno.ENOTSUP)
        else:
            agent.answer(order)

    agent.on_order = answer
    assert await scan(host, agent) == [(0, 100), (0, 50)]
    assert await scan(host, agent) == [(0, 100)]
    assert asked(agent) == [(0, 50)]
    assert await stable(host) == 150


async def test_writes_told_in_a_pass_that_broke_off_are_not_forgotten(
    host: ScannerHost, agent: FakeAgent
) -> None:
    arena = await agent.open("a", random_pages(100, 1))
    await scan(host, agent, 2)
    write(arena, 7)

    def answer(order: Message) -> None:
        if order.type is Type.FINGERPRINT:
            agent.done(order, error=errno.EAGAIN)
        else:
            agent.answer(order)

    agent.on_order = answer
    assert await scan(host, agent) == [(7, 1)]
    agent.on_order = None
    assert await scan(host, agent) == [(0, 100)]
    assert await stable(host) == 99


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("<QQ", 0, 0),
        struct.pack("<QQ", 11, 0),
        struct.pack("<QQ", 10, 1 << 40),
        struct.pack("<QQQQ", 10, 1, 10, 1),
        struct.pack("<QQQQ", 10, 1, 0, 0),
        struct.pack("<QQQQ", 10, 1, 5, 6),
        struct.pack("<QQQQ", 10, 1, 1, (1 << 64) - 1),
        struct.pack("<QQQQQQ", 10, 2, 3, 2, 4, 1),
        struct.pack("<QQQQQQ", 10, 2, 5, 1, 2, 1),
    ],
)
async def test_answers_that_are_none_end_the_connection(
    host: ScannerHost, agent: FakeAgent, answer: bytes
) -> None:
    await agent.open("a", random_pages(10, 1))

    def lie(order: Message) -> None:
        agent.write_window(answer)
        agent.done(order)

    agent.on_order = lie
    await scan(host, agent)
    await agent.hung_up.wait()
