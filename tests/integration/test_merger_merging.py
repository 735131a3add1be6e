"""Candidates become one, and the books stay what the agents' pages map."""

from __future__ import annotations

import asyncio
import errno
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, RefusedError, random_pages
from helpers.merger_host import DOMAIN, ZEROS, MergerHost, store_directory

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage.errors import InvalidArgumentError, NotFoundError
from samepage.v1 import merger_pb2
from samepage_merger.orders import GONE


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
async def host(tmp_path: Path, store: Path) -> AsyncIterator[MergerHost]:
    host = MergerHost(tmp_path, store, timeout=2.0)
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


async def open_all(agents: list[FakeMergingAgent], data: object) -> list[FakeArena]:
    assert isinstance(data, np.ndarray)
    return [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]


async def test_equal_arenas_become_one(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    data = random_pages(1, 1000)
    arenas = await open_all(agents, data)
    outcomes = await host.merge_all(*arenas)
    assert outcomes[:, Outcome.MERGED].tolist() == [1000, 1000, 1000]
    assert outcomes.sum() == 3000
    for arena in arenas:
        assert arena.view() == data.tobytes()
        assert arena.slots.tolist() == arenas[0].slots.tolist()
    host.assert_exact(*agents)
    assert host.domain.store.resident_bytes() == 1000 * PAGE_SIZE


async def test_merging_again_does_nothing(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    arenas = await open_all(agents, random_pages(1, 300))
    await host.merge_all(*arenas)
    assert (await host.merge_all(*arenas)).sum() == 0
    host.assert_exact(*agents)


async def test_only_equal_pages_are_merged(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 600)
    arenas = await open_all(agents, data)
    arenas[1].data[100:200] = random_pages(2, 100)
    outcomes = await host.merge_all(arenas[0], arenas[1])
    assert outcomes[1, Outcome.DIFFERS] == 100
    assert outcomes[1, Outcome.MERGED] == 500
    assert arenas[0].view() == data.tobytes()
    host.assert_exact(*agents)


async def test_what_nobody_maps_is_freed_at_once(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents, random_pages(1, 300))
    arenas[0].pinned[:] = True
    arenas[1].pinned[:] = True
    outcomes = await host.merge_all(arenas[0], arenas[1])
    assert outcomes[0, Outcome.PINNED] == 300
    assert outcomes[1, Outcome.BUSY] == 300
    assert host.domain.store.resident_bytes() == 0
    host.assert_exact(*agents)


async def test_absent_pages(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    arenas = await open_all(agents, random_pages(1, 300))
    arenas[0].absent[:50] = True
    arenas[1].absent[100:150] = True
    outcomes = await host.merge_all(arenas[0], arenas[1])
    assert outcomes[0, Outcome.ABSENT] == 50
    assert outcomes[1, Outcome.DIFFERS] == 50
    assert outcomes[1, Outcome.ABSENT] == 50
    host.assert_exact(*agents)


async def test_a_follower_that_is_shared_already_leads(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents, random_pages(1, 300))
    await host.merge_all(arenas[1], arenas[2])
    outcomes = await host.merge_all(arenas[0], arenas[1])
    assert outcomes[:, Outcome.MERGED].tolist() == [300, 0]
    host.assert_exact(*agents)
    assert len(host.domain.books.table) == 300


async def test_two_sets_of_slots_become_one(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 300)
    agents.append(FakeMergingAgent(host.path))
    await agents[3].connect()
    arenas = await open_all(agents, data)
    await host.merge_all(arenas[0], arenas[1])
    await host.merge_all(arenas[2], arenas[3])
    assert len(host.domain.books.table) == 600
    await asyncio.gather(
        host.merge_all(arenas[0], arenas[2], arenas[3]), host.merge_all(arenas[3], arenas[0])
    )
    await host.merge_all(arenas[0], arenas[1], arenas[2], arenas[3])
    assert len(host.domain.books.table) == 300
    assert all(arena.view() == data.tobytes() for arena in arenas)
    host.assert_exact(*agents)


async def test_scattered_pages_and_one_leader_for_many(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    unique = random_pages(1, 40)
    order = np.random.default_rng(3).integers(0, 40, 700)
    arena = await agents[0].open("many", unique[order])
    other = await agents[1].open("few", unique)
    runs = [(1, 0, int(number), page, 1) for page, number in enumerate(order)]
    outcomes = await host.merge([arena, other], runs)
    assert outcomes[0, Outcome.MERGED] == 700
    assert len(host.domain.books.table) == np.unique(order).size
    assert arena.view() == unique[order].tobytes()
    host.assert_exact(*agents)


async def test_duplicates_within_one_arena(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    half = random_pages(1, 300)
    arena = await agents[0].open("twice", np.concatenate((half, half)))
    outcomes = await host.merge([arena], [(0, 0, 0, 300, 300), (0, 0, 5, 5, 1)])
    assert outcomes[0, Outcome.MERGED] == 600
    assert len(host.domain.books.table) == 300
    host.assert_exact(*agents)


async def test_a_chain_within_one_arena_never_gives_two_slots(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arena = await agents[0].open("same", np.repeat(random_pages(1, 1), 10, axis=0))
    for _ in range(2):
        await host.merge([arena], [(0, 0, 0, 1, 9)])
    assert len(host.domain.books.table) >= 1
    await host.merge([arena], [(0, 0, 0, page, 1) for page in range(1, 10)])
    assert len(host.domain.books.table) == 1
    host.assert_exact(*agents)


async def test_a_cap_on_the_sharers_of_a_slot(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    """Whatever runs side by side, no slot has more, and none is made that is not needed."""
    host.policies.change(merger_pb2.MergerPolicy(sharers_max=4))
    data = random_pages(1, 300)
    twice = np.concatenate((data, data))
    arenas = [await agent.open(f"capped-{n}", twice) for n, agent in enumerate(agents)]
    pairs = [(0, follower, 0, first, 300) for follower in (1, 2) for first in (0, 300)]
    await asyncio.gather(
        host.merge(arenas, [*pairs[:2], (0, 0, 0, 300, 300)]), host.merge(arenas, pairs[2:])
    )
    await host.merge(arenas, [*pairs, (0, 0, 0, 300, 300)])
    assert sharers(host) == {4: 300, 2: 300}
    host.assert_exact(*agents)
    # without a cap the full slots take more again
    host.policies.change(merger_pb2.MergerPolicy(sharers_max=0))
    late = await agents[1].open("late", data)
    await host.merge([arenas[0], late], [(0, 1, 0, 0, 300)])
    assert sum(sharers(host).values()) == 600
    assert late.slots.tolist() == arenas[0].slots[:300].tolist()
    assert all(arena.view() == twice.tobytes() for arena in arenas)
    host.assert_exact(*agents)


async def test_a_late_answer_does_not_break_the_cap(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    """What an agent may still do counts, though nobody waits for it any more."""
    host.policies.change(merger_pb2.MergerPolicy(sharers_max=4))
    arenas = await open_all(agents, np.repeat(random_pages(1, 1), 2, axis=0))
    await host.merge(arenas, [(0, 0, 0, 1, 1)])
    agents[1].obey.clear()
    runs = [(0, 1, 0, page, 1) for page in range(2)]
    assert (await host.merge(arenas, runs))[1, Outcome.BUSY] == 2
    outcomes = await host.merge(arenas, [(0, 2, 0, page, 1) for page in range(2)])
    assert outcomes[2, Outcome.MERGED] == 2
    agents[1].obey.set()
    await agents[1].flushed()
    assert arenas[1].slots.tolist() == arenas[0].slots.tolist()
    assert sharers(host) == {2: 1, 4: 1}
    host.assert_exact(*agents)


async def test_a_page_that_is_not_equal_starts_no_family(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    """What is beyond the cap is compared with what the full slot holds before it gets a slot."""
    host.policies.change(merger_pb2.MergerPolicy(sharers_max=2))
    page = random_pages(1, 1)
    arena = await agents[0].open("same", np.repeat(page, 2, axis=0))
    await host.merge([arena], [(0, 0, 0, 1, 1)])
    other = await agents[1].open("other", np.concatenate((random_pages(2, 1), page, page)))
    outcomes = await host.merge([arena, other], [(0, 1, 0, page, 1) for page in range(3)])
    assert outcomes[1, Outcome.DIFFERS] == 1
    await host.merge([arena, other], [(0, 1, 0, page, 1) for page in range(3)])
    assert sharers(host) == {2: 2}
    host.assert_exact(*agents)


def sharers(host: MergerHost) -> dict[int, int]:
    """How many slots there are by how many pages map them."""
    slots, references = host.domain.books.table.counts()
    alive = np.isin(slots, host.domain.books.table.live())
    counts = np.bincount(references[alive])
    return {count: int(slots) for count, slots in enumerate(counts.tolist()) if slots}


async def test_zero_pages_go_back_to_the_kernel(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 5000)
    data[100:4900] = 0
    arena = await agents[0].open("zeros", data)
    outcomes = await host.merge([arena], [(ZEROS, 0, 0, 50, 4900)])
    assert outcomes[0, Outcome.MERGED] == 4800
    assert outcomes[0, Outcome.DIFFERS] == 100
    assert arena.absent.sum() == 4800
    assert len(host.domain.books.table) == 0
    host.assert_exact(*agents)


async def test_writes_between_orders(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    data = random_pages(1, 2000)
    arenas = await open_all(agents, data)
    written: list[dict[int, bytes]] = [{}, {}, {}]
    generator = np.random.default_rng(7)

    def writer(row: int) -> None:
        for page in generator.integers(0, 2000, 20).tolist():
            written[row][page] = generator.bytes(PAGE_SIZE)
            agents[row].write(arenas[row], page, written[row][page])

    for row, agent in enumerate(agents):
        agent.before_order = lambda order, row=row: writer(row)  # type: ignore[misc]
    for _ in range(5):
        await host.merge_all(*arenas)
    for agent in agents:
        await agent.flushed()
    for row, arena in enumerate(arenas):
        assert written[row]
        for page in range(2000):
            assert arena.page(page) == written[row].get(page, data[page].tobytes())
    host.assert_exact(*agents)


async def test_merge_write_and_merge_again(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 50)
    arenas = await open_all(agents, data)
    for _ in range(3):
        await host.merge_all(*arenas)
        agents[1].write(arenas[1], 7, b"other")
        await agents[1].flushed()
        host.assert_exact(*agents)
        agents[1].write(arenas[1], 7, data[7].tobytes())
        outcomes = await host.merge_all(*arenas)
        assert outcomes[1, Outcome.MERGED] == 1
        host.assert_exact(*agents)


async def test_slots_are_kept_between_two_orders_of_one_batch(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 3000)
    mixed = np.random.default_rng(5).permutation(3000)
    first = await agents[0].open("first", data)
    second = await agents[0].open("second", data)
    follower = await agents[1].open("mixed", data[mixed])
    await host.merge_all(first, second)

    def write_all(order: wire.Message) -> None:
        agents[0].write(first, 0, b"other bytes", 3000)
        agents[0].write(second, 0, b"other bytes", 3000)
        agents[1].before_order = lambda order: None

    agents[1].before_order = write_all
    runs = [(0, 1, int(page), at, 1) for at, page in enumerate(mixed)]
    outcomes = await host.merge([first, follower], runs)
    assert agents[1].orders.count(wire.Type.REPLACE) == 2
    assert outcomes[1, Outcome.MERGED] == 3000
    assert follower.view() == data[mixed].tobytes()
    await agents[0].flushed()
    host.assert_exact(*agents)


async def test_slots_that_were_freed_meanwhile_are_not_given_out(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 10)
    first, second, third = await open_all(agents, data)
    await host.merge_all(first, second)
    slots = first.slots.copy()
    for agent, arena in ((agents[0], first), (agents[1], second)):
        agent.write(arena, 0, b"own", 4)
        await agent.flushed()
    known = host.agents.find(agents[2].agent, third.number)
    assert known is not None
    outcomes = await host.orders.replace(known, np.arange(10), slots)
    assert outcomes.tolist() == [Outcome.BUSY] * 4 + [Outcome.MERGED] * 6
    assert third.view() == data.tobytes()
    host.assert_exact(*agents)


async def test_domains_share_nothing(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    data = random_pages(1, 100)
    arena = await agents[0].open("same-name", data, "one")
    other = await agents[1].open("same-name", data, "two")
    outcomes = await host.merge([arena, other], [(0, 1, 0, 0, 100)], "one")
    assert outcomes[1, GONE] == 100 and outcomes.sum() == 100
    assert not arena.slots.any() and not other.slots.any()
    outcomes = await host.merge([arena, other], [(0, 1, 0, 0, 100)], "three")
    assert outcomes[:, GONE].tolist() == [100, 100]
    host.assert_exact(*agents)


async def test_runs_are_checked(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    arenas = await open_all(agents, random_pages(1, 10))
    for run in [
        (0, 1, 0, 0, 11),
        (0, 1, 10, 0, 1),
        (0, 1, 0, 2**64 - 1, 2),
        (0, 1, 0, 0, 0),
        (0, 7, 0, 0, 1),
        (3, 1, 0, 0, 1),
        (ZEROS, 1, 0, 9, 2),
    ]:
        with pytest.raises(InvalidArgumentError):
            await host.merge(arenas, [run])
    with pytest.raises(InvalidArgumentError, match="32-byte records"):
        async for _ in host.engine.merge(DOMAIN, [], b"x"):
            pass
    assert (await host.merge(arenas, [])).sum() == 0


async def test_a_full_store_is_busy_and_loses_nothing(
    tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = MergerHost(tmp_path, store, limit_bytes=300 * PAGE_SIZE)
    agents = [FakeMergingAgent(host.path) for _ in range(2)]
    for agent in agents:
        await agent.connect()
    data = random_pages(1, 1000)
    arenas = await open_all(agents, data)
    outcomes = await host.merge_all(*arenas)
    assert outcomes[:, Outcome.MERGED].tolist() == [300, 300]
    assert outcomes[:, Outcome.BUSY].tolist() == [700, 700]
    assert all(arena.view() == data.tobytes() for arena in arenas)
    host.assert_exact(*agents)
    for agent in agents:
        await agent.die()
    host.stop()


async def test_extra_memory_is_bounded(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    arenas = await open_all(agents, random_pages(1, 3000))
    most = 0

    def measure(order: wire.Message) -> None:
        nonlocal most
        private = sum(int((arena.slots == 0).sum()) for arena in arenas)
        stored = host.domain.store.resident_bytes() // PAGE_SIZE
        most = max(most, stored + private - 9000)

    for agent in agents:
        agent.before_order = measure
    outcomes = await host.merge_all(*arenas)
    assert outcomes[:, Outcome.MERGED].tolist() == [3000] * 3
    assert 0 < most * PAGE_SIZE <= 4 << 20
    host.assert_exact(*agents)


async def test_an_agent_that_does_not_answer_is_busy_and_catches_up(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, 1000)
    arenas = await open_all(agents, data)
    agents[1].obey.clear()
    outcomes = await host.merge_all(*arenas)
    assert outcomes[0, Outcome.MERGED] == outcomes[2, Outcome.MERGED] == 1000
    assert outcomes[1, Outcome.BUSY] == 1000
    assert agents[1].orders.count(wire.Type.REPLACE) == 1
    agents[1].obey.set()
    await agents[1].flushed()
    host.assert_exact(*agents)
    assert arenas[1].slots.any()
    await host.merge_all(*arenas)
    assert arenas[1].slots.all() and arenas[1].view() == data.tobytes()
    host.assert_exact(*agents)


async def test_a_cancelled_merge_leaves_the_books_right(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents, random_pages(1, 2000))
    agents[1].obey.clear()
    merging = asyncio.ensure_future(host.merge_all(arenas[0], arenas[1]))
    await agents[1].until_ordered(wire.Type.REPLACE)
    merging.cancel()
    await asyncio.wait({merging})
    agents[1].obey.set()
    for agent in agents:
        await agent.flushed()
    host.assert_exact(*agents)
    outcomes = await host.merge_all(*arenas)
    assert outcomes[2, Outcome.MERGED] == 2000
    host.assert_exact(*agents)


async def test_an_agent_that_disconnects_in_the_middle_is_gone(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents, random_pages(1, 1000))
    agents[1].obey.clear()
    merging = asyncio.ensure_future(host.merge_all(*arenas))
    await agents[1].until_ordered(wire.Type.REPLACE)
    await agents[1].disconnect()
    outcomes = await merging
    assert outcomes[1, GONE] == 1000
    assert outcomes[2, Outcome.MERGED] == 1000


async def test_unshare(host: MergerHost, agents: list[FakeMergingAgent]) -> None:
    data = random_pages(1, 9000)
    arenas = await open_all(agents, data)
    await host.merge_all(*arenas)
    assert await host.unsharer.unshare(DOMAIN, "arena-1") == 9000
    assert not arenas[1].slots.any() and arenas[1].view() == data.tobytes()
    host.assert_exact(*agents)
    assert await host.unsharer.unshare(DOMAIN, "arena-1") == 0
    with pytest.raises(NotFoundError):
        await host.unsharer.unshare(DOMAIN, "no such arena")
    agents[2].obey.clear()
    with pytest.raises(TimeoutError):
        await host.unsharer.unshare(DOMAIN, "arena-2")
    agents[2].obey.set()
    await agents[2].flushed()
    host.assert_exact(*agents)


async def test_accounts_sum_to_what_is_saved(
    host: MergerHost, agents: list[FakeMergingAgent]
) -> None:
    arenas = await open_all(agents, random_pages(1, 300))
    await host.merge_all(*arenas)
    accounts = [await agents[n].account(arena) for n, arena in enumerate(arenas)]
    assert [shared for shared, _ in accounts] == [300] * 3
    assert sum(saved for _, saved in accounts) == pytest.approx(600 * PAGE_SIZE, abs=3)
    with pytest.raises(RefusedError) as refused:
        await agents[0].request(wire.Type.ACCOUNT, 99)
    assert refused.value.args[0] == errno.ENOENT
