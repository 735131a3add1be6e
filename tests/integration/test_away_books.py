"""Away pages in the merger's books: by orders, by announcements, and by agents that lie."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, random_pages
from helpers.merger_host import MergerHost, store_directory
from helpers.waiting import until

from samepage.daemon import wire
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena, State
from samepage_merger.cluster.away import AwayMap, Digests

PAGES = 600


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def host(tmp_path: Path, store: Path) -> AsyncIterator[MergerHost]:
    host = MergerHost(tmp_path, store)
    yield host
    host.stop()


@pytest.fixture
async def agent(host: MergerHost) -> AsyncIterator[FakeMergingAgent]:
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    yield agent
    await agent.die()


def pages(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


def digests(data: npt.NDArray[np.uint8]) -> Digests:
    """Any digest will do where nobody looks."""
    packed = b"".join(hashlib.sha256(page.tobytes()).digest() for page in data)
    return np.frombuffer(packed, np.uint8).reshape(-1, 32)


def found(host: MergerHost, arena: FakeArena) -> Arena:
    known = host.agents.find(arena.owner.agent, arena.number)
    assert known is not None
    return known


async def evict(host: MergerHost, arena: FakeArena, *numbers: int) -> list[int]:
    data = np.stack([np.frombuffer(arena.page(page), np.uint8) for page in numbers])
    outcomes = await host.orders.evict(
        found(host, arena), pages(*numbers), data.tobytes(), digests(data)
    )
    return [int(outcome) for outcome in outcomes]


def same_away(host: MergerHost, arena: FakeArena) -> bool:
    away = found(host, arena).away
    numbers = away.all()
    packed = away.digests(numbers)
    return {
        page: digest.tobytes() for page, digest in zip(numbers.tolist(), packed, strict=True)
    } == arena.away


async def test_evicted_pages_are_away_and_come_back(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(1, PAGES)
    arena = await agent.open("arena", data)
    arena.pinned[7] = True
    arena.absent[8] = True
    assert await evict(host, arena, 3, 4, 5) == [0, 0, 0]
    outcomes = await host.orders.evict(
        found(host, arena), pages(4, 6, 7, 8), data[[4, 5, 7, 8]].tobytes(), digests(data[:4])
    )
    assert outcomes.tolist() == [Outcome.ABSENT, Outcome.DIFFERS, Outcome.PINNED, Outcome.ABSENT]
    assert sorted(arena.away) == [3, 4, 5]
    assert same_away(host, arena)
    assert host.domain.needed().tobytes() == digests(data[3:6]).tobytes()

    outcomes = await host.orders.fill(found(host, arena), pages(2, 4, 5), data[[2, 4, 5]].tobytes())
    assert outcomes.tolist() == [Outcome.BUSY, 0, 0]
    assert same_away(host, arena) and sorted(arena.away) == [3]
    assert (await host.orders.poison(found(host, arena), pages(3))).tolist() == [0]
    assert same_away(host, arena) and not arena.away and arena.poisoned[3]
    assert host.domain.needed().size == 0


async def test_a_page_that_there_is_no_memory_for_stays_away(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(1, 4)
    arena = await agent.open("arena", data)
    await evict(host, arena, 1, 2)
    digest = arena.away[1]
    agent.lie = lambda outcomes: np.array([Outcome.NO_MAPPING, Outcome.MERGED], np.uint8)
    outcomes = await host.orders.fill(found(host, arena), pages(1, 2), data[1:3].tobytes())
    assert outcomes.tolist() == [Outcome.NO_MAPPING, Outcome.MERGED]
    assert host.domain.needed().tobytes() == digest


async def test_evicted_shared_pages_let_go_of_their_slots(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(1, 64)
    arenas = [await agent.open(name, data) for name in ("a", "b")]
    await host.merge_all(*arenas)
    assert await evict(host, arenas[0], *range(64)) == [0] * 64
    host.assert_exact(agent)
    assert found(host, arenas[0]).map.shared == 0
    assert await evict(host, arenas[1], *range(64)) == [0] * 64
    host.assert_exact(agent)
    assert host.domain.store.resident_bytes() == 0


async def test_a_page_that_is_away_comes_back_by_a_slot(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(1, 64)
    a, b, c = [await agent.open(name, data) for name in "abc"]
    await host.merge_all(a, b)
    await evict(host, c, *range(64))
    slots = found(host, a).map.slots(np.arange(64))
    assert not (await host.orders.replace(found(host, c), np.arange(64), slots)).any()
    host.assert_exact(agent)
    assert same_away(host, c) and c.view() == data.tobytes()


async def test_a_merger_that_restarts_learns_what_is_away(
    host: MergerHost, agent: FakeMergingAgent, tmp_path: Path, store: Path
) -> None:
    data = random_pages(1, 4 * wire.AWAY_PAGES_MAX)
    arenas = [await agent.open(name, data) for name in ("a", "b")]
    await host.merge(arenas, [(0, 1, 0, 0, 500)])
    numbers = np.arange(100, 4 * wire.AWAY_PAGES_MAX, 2)
    for low in range(0, numbers.size, 512):
        await evict(host, arenas[0], *numbers[low : low + 512].tolist())
    host.crash()
    await agent.ended.wait()
    await agent.disconnect()
    again = MergerHost(tmp_path, store)
    await agent.connect()
    for arena in arenas:
        await agent.announce(arena)
    assert len(arenas[0].away) == numbers.size
    assert same_away(again, arenas[0]) and same_away(again, arenas[1])
    again.assert_exact(agent)
    await agent.die()
    again.stop()


async def test_a_store_that_is_gone_leaves_away_pages_away(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    arena = await agent.open("arena", random_pages(1, 8))
    await evict(host, arena, 1, 2, 3)
    known = found(host, arena)
    await agent.disconnect()
    arena.leave_store()
    await until(lambda: host.janitor.run_once() and known.state is State.CLOSED)
    assert host.domain.needed().size == 0
    await agent.connect()
    await agent.announce(arena)
    assert arena.store >= 0 and same_away(host, arena) and len(arena.away) == 3


async def test_what_may_be_away_is_needed_until_it_is_known(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    """The connection ends before the answer: the page may be away or not."""
    data = random_pages(1, 8)
    arena = await agent.open("arena", data)
    agent.before_order = lambda order: agent.obey.clear()
    order = asyncio.ensure_future(evict(host, arena, 5))
    await agent.until_ordered(wire.Type.EVICT)
    await agent.disconnect()
    assert await order == [7]
    assert host.domain.needed().tobytes() == digests(data[5:6]).tobytes()
    agent.before_order = lambda order: None
    agent.obey.set()
    await agent.connect()
    await agent.announce(arena)
    assert same_away(host, arena) and host.domain.needed().size == 0


async def test_nobody_writes_into_the_window_of_an_order_that_was_given_up(
    host: MergerHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(1, 8)
    arena = await agent.open("arena", data)
    await evict(host, arena, 1, 2)
    agent.obey.clear()
    fill = asyncio.ensure_future(
        host.orders.fill(found(host, arena), pages(1), data[1:2].tobytes())
    )
    await agent.until_ordered(wire.Type.FILL)
    fill.cancel()
    await asyncio.wait({fill})
    other = await host.orders.fill(found(host, arena), pages(2), data[2:3].tobytes())
    assert other.tolist() == [Outcome.BUSY]
    agent.obey.set()
    await until(lambda: found(host, arena).away.away == 1)
    assert arena.page(1) == data[1].tobytes()
    assert not (await host.orders.fill(found(host, arena), pages(2), data[2:3].tobytes())).any()
    assert arena.view() == data.tobytes()


def records(*numbers: int) -> bytes:
    return np.array([(number, bytes(32)) for number in numbers], wire.AWAY).tobytes()


@pytest.mark.parametrize(
    ("away", "payload"),
    [
        (2, records(3, 3)),
        (2, records(3, 2)),
        (2, records(3, 8)),
        (1, records(2**63)),
        (1, records(1, 2)),
        (1, records(1)[:-1]),
        (9, records(1)),
        (2**64 - 1, records(1)),
    ],
)
async def test_away_pages_that_cannot_be_end_the_connection(
    host: MergerHost, agent: FakeMergingAgent, away: int, payload: bytes
) -> None:
    wanted = wire.ArenaOpen(8, 0, 0, "arena", "default", away)
    agent.send(wire.Type.ARENA_OPEN, 1, wire.pack_arena_open(wanted), 5)
    agent.send(wire.Type.AWAY_PAGES, 1, payload)
    async with asyncio.timeout(5):
        await agent.ended.wait()
    await host.settled()
    assert not host.domain.arenas


def test_the_map_gives_memory_back() -> None:
    away = AwayMap(1 << 20)
    numbers = np.arange(0, 1 << 20, 3)
    some = random_pages(1, 1)[0][:32]
    away.add(numbers, np.broadcast_to(some, (numbers.size, 32)))
    assert away.away == numbers.size and away.contains(numbers).all()
    assert away.within(pages(1, 9), pages(3, 1)).tolist() == [3, 9]
    assert (away.digests(pages(0, 9)) == some).all()
    assert away.remove(np.arange(1 << 19)) == np.count_nonzero(numbers < 1 << 19)
    assert away.all().tolist() == numbers[numbers >= 1 << 19].tolist()
    away.clear()
    assert away.away == 0 and away.all().size == 0
