"""Agents that come, break off, come back, die and lie, and a merger that dies itself."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_merging_agent
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, RefusedError, random_pages
from helpers.merger_host import DOMAIN, MergerHost, store_directory

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage_merger.arena import State
from samepage_merger.orders import GONE

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
    gc.collect()


@pytest.fixture
async def agents(host: MergerHost) -> AsyncIterator[list[FakeMergingAgent]]:
    agents = [FakeMergingAgent(host.path) for _ in range(3)]
    for agent in agents:
        await agent.connect()
    yield agents
    for agent in agents:
        await agent.die()


@pytest.fixture
async def arenas(host: MergerHost, agents: list[FakeMergingAgent]) -> list[FakeArena]:
    """Three arenas of the same bytes, merged."""
    data = random_pages(1, PAGES)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    outcomes = await host.merge_all(*arenas)
    assert outcomes[:, Outcome.MERGED].tolist() == [PAGES] * 3
    return arenas


def stored_pages(host: MergerHost) -> int:
    return host.domain.store.resident_bytes() // PAGE_SIZE


async def refusal(agent: FakeMergingAgent, arena: FakeArena, **how: object) -> int:
    with pytest.raises(RefusedError) as refused:
        await agent.announce(arena, **how)  # type: ignore[arg-type]
    assert len(refused.value.args[1]) > 20
    error: int = refused.value.args[0]
    return error


class TestOpening:
    async def test_names_are_unique_in_their_domain(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        data = random_pages(1, 4)
        first = await agents[0].open("weights", data)
        with pytest.raises(RefusedError) as refused:
            await agents[1].open("weights", data)
        assert refused.value.args[0] == errno.EEXIST
        assert "another name" in refused.value.args[1]
        await agents[1].open("weights", data, "elsewhere")
        await agents[0].close_arena(first)
        await agents[1].open("weights", data)

    @pytest.mark.parametrize("name", ["", "a/b", "a\nb", "x" * 128])
    async def test_bad_names_are_refused(self, agents: list[FakeMergingAgent], name: str) -> None:
        with pytest.raises(RefusedError) as refused:
            await agents[0].open(name, random_pages(1, 1))
        assert refused.value.args[0] == errno.EINVAL
        await agents[0].open("a good one", random_pages(1, 1))

    @pytest.mark.parametrize("domain", ["-a", "A", "a" * 64, "a_b"])
    async def test_bad_domains_are_refused(
        self, agents: list[FakeMergingAgent], domain: str
    ) -> None:
        with pytest.raises(RefusedError) as refused:
            await agents[0].open("arena", random_pages(1, 1), domain)
        assert refused.value.args[0] == errno.EINVAL

    @pytest.mark.parametrize("pages", [0, 2**36 + 1, 2**64 - 1])
    async def test_bad_sizes_are_refused(self, agents: list[FakeMergingAgent], pages: int) -> None:
        with pytest.raises(RefusedError) as refused:
            await agents[0].open("arena", random_pages(1, 1), pages=pages)
        assert refused.value.args[0] == errno.EINVAL

    async def test_closing_frees_name_and_slots(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        for agent, arena in zip(agents, arenas, strict=True):
            await agent.close_arena(arena)
            host.assert_exact(*agents)
        assert stored_pages(host) == 0
        await agents[2].open("arena-0", random_pages(1, 1))

    async def test_without_descriptors_an_agent_is_refused_and_the_others_go_on(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        pages = random_pages(1, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        domain = host.domain
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(RefusedError) as refused:
                await agents[0].open("arena", pages)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert refused.value.args[0] == errno.EMFILE
        assert not domain.names and not domain.arenas
        await agents[0].open("arena", random_pages(1, 1))
        host.assert_exact(*agents)


class TestBreakingOff:
    async def test_a_broken_connection_is_not_a_death(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        data = arenas[0].view()
        for agent in agents:
            await agent.disconnect()
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            while len(host.agents):
                await asyncio.sleep(0)
        assert not host.janitor.run_once()
        assert stored_pages(host) == PAGES
        assert all(arena.view() == data for arena in arenas)
        for agent, arena in zip(agents, arenas, strict=True):
            await agent.connect()
            await agent.announce(arena)
        assert host.janitor.run_once()
        host.assert_exact(*agents)

    async def test_what_changed_meanwhile_is_what_counts(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        await agents[0].disconnect()
        for page in range(0, PAGES, 3):
            agents[0].write(arenas[0], page, b"written while away")
        await agents[0].connect()
        await agents[0].announce(arenas[0])
        host.assert_exact(*agents)

    async def test_orders_in_flight_keep_their_slots_until_the_truth_is_told(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        data = random_pages(1, 200)
        arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]

        def replace_unheard(order: wire.Message) -> None:
            agents[1].replace(arenas[1], order)

        agents[1].obey.clear()
        agents[1].before_order = replace_unheard
        merging = asyncio.ensure_future(host.merge_all(arenas[0], arenas[1]))
        await agents[1].until_ordered(wire.Type.REPLACE)
        await agents[1].disconnect()
        await merging
        agents[0].write(arenas[0], 0, b"not shared any more", 200)
        await agents[0].flushed()
        host.janitor.run_once()
        assert arenas[1].slots.all()
        assert stored_pages(host) == 200
        assert arenas[1].view() == data.tobytes()
        await agents[1].connect()
        await agents[1].announce(arenas[1])
        host.assert_exact(*agents)
        assert arenas[1].view() == data.tobytes()

    async def test_orders_that_were_never_carried_out_keep_nothing_once_that_is_told(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        data = random_pages(1, 200)
        arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
        agents[1].obey.clear()
        merging = asyncio.ensure_future(host.merge_all(arenas[0], arenas[1]))
        await agents[1].until_ordered(wire.Type.REPLACE)
        await agents[1].disconnect()
        await merging
        agents[0].write(arenas[0], 0, b"not shared any more", 200)
        await agents[0].flushed()
        assert stored_pages(host) == 200
        await agents[1].connect()
        await agents[1].announce(arenas[1])
        host.assert_exact(*agents)
        assert stored_pages(host) == 0

    async def test_a_newer_connection_of_the_same_process_replaces_the_older(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        forgotten = agents[0]._sock
        assert forgotten is not None and agents[0]._receiver is not None
        agents[0]._receiver.cancel()
        await agents[0].connect()
        await agents[0].announce(arenas[0])
        host.assert_exact(*agents)
        assert len(host.agents) == 3
        forgotten.close()

    async def test_announcing_anew_on_the_same_connection(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        for page in range(50):
            arenas[0].take_back(page)
        await agents[0].announce(arenas[0])
        host.assert_exact(*agents)
        assert host.agents.find(agents[0].agent, 1) is not None

    async def test_broken_off_in_the_middle_of_announcing(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        data = arenas[0].view()
        for page in range(0, PAGES, 2):
            arenas[0].take_back(page)
        for _ in range(3):
            await agents[0].disconnect()
            await agents[0].connect()
            runs = arenas[0].extents()
            name, lock = arenas[0].name, arenas[0].lock
            payload = wire.pack_arena_open(wire.ArenaOpen(PAGES, lock, runs.size, name, DOMAIN))
            agents[0].send(wire.Type.ARENA_OPEN, 1, payload, 5, [arenas[0].store])
            agents[0].send(wire.Type.EXTENTS, 1, runs[:100].tobytes())
            await agents[0].flushed()
            assert host.agents.find(agents[0].agent, 1) is None
        await agents[0].disconnect()
        await agents[0].connect()
        host.janitor.run_once()
        assert arenas[0].view() == data
        await agents[0].announce(arenas[0])
        host.assert_exact(*agents)

    async def test_a_name_in_limbo_is_taken_until_its_lock_is_gone(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        await agents[0].disconnect()
        with pytest.raises(RefusedError) as refused:
            await agents[1].open("arena-0", random_pages(1, 1))
        assert refused.value.args[0] == errno.EEXIST
        await agents[0].die()
        await agents[1].open("arena-0", random_pages(1, 1))
        host.assert_exact(*agents)

    async def test_the_same_agent_may_open_its_name_anew(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        await agents[0].disconnect()
        old = agents[0].arenas.pop(1)
        await agents[0].connect()
        await agents[0].open("arena-0", random_pages(9, 10))
        assert stored_pages(host) == PAGES
        host.janitor.run_once()
        await agents[1].die()
        await agents[2].die()
        await host_sees(host, 1)
        host.janitor.run_once()
        assert stored_pages(host) == PAGES, "the earlier life's mappings may still be alive"
        os.close(old.store)
        await host.settled()
        host.assert_exact(*agents)
        assert stored_pages(host) == 0


async def host_sees(host: MergerHost, agents: int) -> None:
    """Wait until so many agents are connected."""
    async with asyncio.timeout(5):
        while len(host.agents) != agents:
            await asyncio.sleep(0)


class TestDying:
    async def test_the_dead_leave_nothing(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        for alive in (2, 1, 0):
            await agents[alive].die()
            await host_sees(host, alive)
            await host.settled()
            host.assert_exact(*agents)
        assert stored_pages(host) == 0
        assert not list(host.domains.arenas())

    async def test_killed_in_the_middle_of_an_order(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        data = random_pages(5, 300)
        arena = await agents[0].open("here", data)
        victim = await asyncio.create_subprocess_exec(
            sys.executable,
            fake_merging_agent.__file__,
            *(str(host.path), "there", "5", "300", "stall"),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert victim.stdout is not None
        assert await victim.stdout.readline() == b"open\n"
        there = next(a for a in host.domains.arenas() if a.name == "there")
        other = FakeArena(agents[0], there.number, "there", DOMAIN, data)
        other.owner = FakeMergingAgent(host.path)
        other.owner.agent = there.agent
        merging = asyncio.ensure_future(host.merge_all(arena, other))
        assert await victim.stdout.readline() == b"stalled\n"
        agents[0].write(arena, 0, b"other bytes", 300)
        await agents[0].flushed()
        assert stored_pages(host) > 0, "the order in flight holds its slots"
        victim.send_signal(signal.SIGKILL)
        outcomes = await merging
        assert outcomes[1, GONE] > 0
        await victim.wait()
        await host.settled()
        host.assert_exact(*agents)
        assert stored_pages(host) == 0

    async def test_a_stopped_process_keeps_its_pages(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        await agents[0].disconnect()
        await host_sees(host, 2)
        for agent in agents[1:]:
            await agent.die()
        await host_sees(host, 0)
        for _ in range(3):
            assert not host.janitor.run_once()
        assert stored_pages(host) == PAGES
        assert arenas[0].view() == random_pages(1, PAGES).tobytes()


class TestRestart:
    async def test_agents_announce_themselves_and_the_books_are_the_same(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        tmp_path: Path,
        store: Path,
    ) -> None:
        data = arenas[0].view()
        host.crash()
        again = MergerHost(tmp_path, store)
        for agent, arena in zip(agents, arenas, strict=True):
            await agent.disconnect()
            agent.write(arena, 3, b"written while the merger was away")
        assert not again.janitor.run_once()
        for agent, arena in zip(agents, arenas, strict=True):
            assert stored_pages(again) == PAGES
            await agent.connect()
            await agent.announce(arena)
            again.janitor.run_once()
        assert again.janitor.run_once()
        again.assert_exact(*agents)
        assert stored_pages(again) == PAGES - 1
        late = await agents[0].open("late", np.frombuffer(data, np.uint8).reshape(PAGES, -1))
        outcomes = await again.merge_all(arenas[1], late)
        assert outcomes[1, Outcome.MERGED] == PAGES - 1
        again.assert_exact(*agents)
        again.stop()

    async def test_nothing_is_freed_before_the_last_living_agent_has_come(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        tmp_path: Path,
        store: Path,
    ) -> None:
        data = arenas[0].view()
        alone = await agents[2].open("alone", random_pages(7, 20))
        twin = await agents[2].open("twin", random_pages(7, 20))
        await host.merge_all(alone, twin)
        host.crash()
        again = MergerHost(tmp_path, store)
        for agent, arena in zip(agents[:2], arenas[:2], strict=True):
            await agent.disconnect()
            await agent.connect()
            await agent.announce(arena)
        await agents[2].disconnect()
        assert not again.janitor.run_once()
        assert alone.view() == twin.view() == random_pages(7, 20).tobytes()
        await agents[2].die()
        await again.settled()
        again.assert_exact(*agents)
        assert stored_pages(again) == PAGES
        assert arenas[0].view() == data
        again.stop()

    async def test_a_slot_that_only_an_unheard_agent_still_maps_stays(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        tmp_path: Path,
        store: Path,
    ) -> None:
        data = arenas[0].view()
        host.crash()
        again = MergerHost(tmp_path, store)
        for agent in agents:
            await agent.disconnect()
        for agent, arena in zip(agents[:2], arenas[:2], strict=True):
            await agent.connect()
            await agent.announce(arena)
        agents[0].write(arenas[0], 0, b"own", PAGES)
        await agents[1].close_arena(arenas[1])
        assert len(again.domain.books.table) == 0
        again.janitor.run_once()
        assert arenas[2].view() == data
        fresh = await agents[0].open("fresh", random_pages(8, 10))
        twin = await agents[1].open("twin", random_pages(8, 10))
        await again.merge_all(fresh, twin)
        await agents[0].close_arena(fresh)
        await agents[1].close_arena(twin)
        assert stored_pages(again) == PAGES, "slots of this merger's own are freed at once"
        await agents[2].connect()
        await agents[2].announce(arenas[2])
        again.janitor.run_once()
        again.assert_exact(*agents)
        await agents[2].close_arena(arenas[2])
        assert stored_pages(again) == 0
        again.stop()

    async def test_a_store_without_agents_is_emptied_and_removed(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        tmp_path: Path,
        store: Path,
    ) -> None:
        host.crash()
        for agent in agents:
            await agent.die()
        again = MergerHost(tmp_path, store)
        assert again.domains.resident_bytes() == PAGES * PAGE_SIZE
        assert again.janitor.run_once()
        assert again.domains.resident_bytes() == 0
        again.stop()
        assert not store.exists()

    async def test_a_lost_store_is_stale_and_agents_move_to_the_new_one(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        tmp_path: Path,
        store: Path,
    ) -> None:
        data = arenas[0].view()
        host.crash()
        for file in store.iterdir():
            file.unlink()
        again = MergerHost(tmp_path, store)
        for agent, arena in zip(agents, arenas, strict=True):
            await agent.disconnect()
            await agent.connect()
            assert await refusal(agent, arena) == errno.ESTALE
            assert arena.view() == data
            arena.leave_store()
            await agent.announce(arena)
        await again.merge_all(*arenas)
        assert all(arena.view() == data and arena.slots.all() for arena in arenas)
        again.assert_exact(*agents)
        again.stop()


class TestLying:
    """A liar harms itself alone."""

    async def test_extents_with_another_agents_lock_are_stale(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        liar = FakeArena(agents[1], 2, "liar", DOMAIN, arenas[0].data)
        liar.slots[:] = arenas[0].slots
        liar.lock = arenas[0].lock
        assert await refusal(agents[1], liar, fd=arenas[1].store) == errno.ESTALE
        liar.lock = 0
        assert await refusal(agents[1], liar, fd=arenas[1].store) == errno.ESTALE
        read_end, write_end = os.pipe()
        liar.lock = arenas[1].lock
        assert await refusal(agents[1], liar, fd=read_end) == errno.ESTALE
        os.close(read_end)
        os.close(write_end)
        host.assert_exact(*agents)

    async def test_claiming_others_slots_only_keeps_them_longer(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        for page in range(PAGES):
            arenas[0].take_back(page)
        claimed = arenas[1].extents()
        await agents[0].disconnect()
        await agents[0].connect()
        await agents[0].announce(arenas[0], extents=claimed)
        assert host.domain.books.shared_pages() == 3 * PAGES
        for agent, arena in zip(agents[1:], arenas[1:], strict=True):
            await agent.close_arena(arena)
        assert stored_pages(host) == PAGES
        payload = wire.PAGE_RANGE.pack(0, PAGES) * 3
        agents[0].send(wire.Type.RESTORED, 1, payload)
        agents[0].send(wire.Type.RESTORED, 1, payload)
        await agents[0].flushed()
        host.assert_exact(*agents)
        assert stored_pages(host) == 0

    async def test_restoring_what_is_not_shared_moves_no_other_reference(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        data = arenas[1].view()
        for _ in range(3):
            agents[0].send(wire.Type.RESTORED, 1, wire.PAGE_RANGE.pack(0, PAGES))
        await agents[0].flushed()
        for page in range(PAGES):
            arenas[0].take_back(page)
        host.assert_exact(*agents)
        assert arenas[1].view() == arenas[2].view() == data

    async def test_lies_about_outcomes(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        arenas = [
            await agent.open(f"arena-{n}", random_pages(n, 300)) for n, agent in enumerate(agents)
        ]
        agents[1].lie = np.zeros_like
        outcomes = await host.merge_all(*arenas)
        assert outcomes[1, Outcome.MERGED] == 300
        assert outcomes[2, Outcome.DIFFERS] == 300
        assert arenas[0].view() == random_pages(0, 300).tobytes()
        await agents[1].die()
        await host_sees(host, 2)
        await host.settled()
        host.assert_exact(*agents)

    @pytest.mark.parametrize(
        ("kind", "payload"),
        [
            (wire.Type.RESTORED, wire.PAGE_RANGE.pack(PAGES, 1)),
            (wire.Type.RESTORED, wire.PAGE_RANGE.pack(2**64 - 1, 2)),
            (wire.Type.RESTORED, b"12345"),
            (wire.Type.EXTENTS, bytes(24)),
            (wire.Type.SHARE, b""),
            (wire.Type.WELCOME, b""),
            (wire.Type.DONE, wire.DONE.pack(0, 0)),
            (wire.Type.HELLO, bytes(24)),
            (wire.Type.ARENA_OPEN, b"short"),
            (wire.Type.ARENA_OPEN, wire.ARENA_OPEN.pack(1, 0, 0, 100, 100, 0, bytes(16))),
            (wire.Type.ARENA_OPEN, wire.ARENA_OPEN.pack(1, 0, 0, 2, 0, 0, bytes(16)) + b"\xff\xfe"),
            (wire.Type.ARENA_OPEN, wire.ARENA_OPEN.pack(1, 0, 0, 1, 1, 0, bytes(16)) + b"ab"),
        ],
    )
    async def test_a_broken_rule_ends_that_connection_alone(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        kind: wire.Type,
        payload: bytes,
    ) -> None:
        agents[0].send(kind, 1, payload)
        async with asyncio.timeout(5):
            await agents[0].ended.wait()
        assert len(host.agents) == 2
        assert {arena.state for arena in host.domains.arenas()} == {State.LIMBO, State.OPEN}
        await agents[0].disconnect()
        await agents[0].connect()
        await agents[0].announce(arenas[0])
        host.assert_exact(*agents)

    @pytest.mark.parametrize(
        "extents",
        [
            [(0, 1, 0)],
            [(0, 0, 1)],
            [(0, 2, 5), (1, 1, 9)],
            [(5, 1, 5), (1, 1, 9)],
            [(PAGES, 1, 5)],
            [(0, 1, 10**9)],
            [(0, 2**63, 1)],
            [(0, 1, 2**64 - 1)],
        ],
    )
    async def test_impossible_extents(
        self,
        host: MergerHost,
        agents: list[FakeMergingAgent],
        arenas: list[FakeArena],
        extents: list[tuple[int, int, int]],
    ) -> None:
        await agents[0].disconnect()
        await agents[0].connect()
        with pytest.raises(ConnectionError):
            await agents[0].announce(arenas[0], extents=np.array(extents, wire.EXTENT))
        await agents[0].disconnect()
        await agents[0].connect()
        await agents[0].announce(arenas[0])
        host.assert_exact(*agents)

    async def test_outcomes_that_do_not_fit_the_order(
        self, host: MergerHost, agents: list[FakeMergingAgent]
    ) -> None:
        data = random_pages(1, 300)
        arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
        agents[1].lie = lambda outcomes: outcomes[1:]
        outcomes = await host.merge_all(*arenas)
        assert outcomes[1, GONE] == 300
        assert outcomes[[0, 2], Outcome.MERGED].tolist() == [300, 300]
        assert len(host.agents) == 2

    async def test_garbage(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        generator = np.random.default_rng(1)
        for size in (1, 15, 16, 100, 65_536):
            for _ in range(5):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sock.connect(str(host.path))
                sock.send(generator.bytes(size))
                await host_sees(host, 3)
                sock.close()
        for packet in (wire.pack(wire.Type.EXTENTS)[:10], b"\x53\x50\x01\x63" + bytes(12)):
            stranger = FakeMergingAgent(host.path)
            await stranger.connect()
            stranger.send_packet(packet)
            async with asyncio.timeout(5):
                await stranger.ended.wait()
            await stranger.die()
        await agents[0].flushed()
        host.assert_exact(*agents)

    async def test_an_agents_number_cannot_be_taken_by_another_process(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        number = agents[0].agent.hex()
        script = (
            "import socket, sys\n"
            "from samepage.daemon import wire\n"
            "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "sock.connect(sys.argv[1])\n"
            "hello = wire.HELLO.pack(bytes.fromhex(sys.argv[2]), 1, 0)\n"
            "sock.send(wire.pack(wire.Type.HELLO, 1, 0, hello))\n"
            "while sock.recv(65536): pass\n"
        )
        thief = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, str(host.path), number),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        async with asyncio.timeout(10):
            assert await thief.wait() == 0
        await agents[0].flushed()
        assert len(host.agents) == 3
        host.assert_exact(*agents)

    async def test_touching_holes_of_the_store_does_not_fill_it(
        self, host: MergerHost, agents: list[FakeMergingAgent], arenas: list[FakeArena]
    ) -> None:
        for agent, arena in zip(agents[1:], arenas[1:], strict=True):
            await agent.close_arena(arena)
        for page in range(PAGES):
            arenas[0].take_back(page)
        agents[0].send(wire.Type.RESTORED, 1, wire.PAGE_RANGE.pack(0, PAGES))
        await agents[0].flushed()
        assert stored_pages(host) == 0
        with mmap.mmap(
            arenas[0].store, (PAGES + 1) * PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ
        ) as memory:
            assert sum(memory[::PAGE_SIZE]) == 0
        assert stored_pages(host) > 0
        assert host.janitor.run_once()
        host.assert_exact(*agents)
