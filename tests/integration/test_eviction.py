"""Evicting pages, and bringing them back: what is said to be away is safe, and nothing is lost."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from fakes.fake_merging_agent import FakeMergingAgent, RefusedError
from helpers.evicting_host import EvictingCluster, EvictingHost, came_back, evicting_cluster, swept
from helpers.pages_host import random_pages
from helpers.waiting import until

from samepage.daemon import wire
from samepage_merger.cluster.eviction import RUN
from samepage_merger.cluster.letting_go import let_go

PAGES = 1200


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[EvictingCluster]:
    async with evicting_cluster(tmp_path, lost_seconds=0.2) as cluster:
        yield cluster


@pytest.fixture
async def host(cluster: EvictingCluster) -> EvictingHost:
    return await cluster.add("a")


@pytest.fixture
async def agent(host: EvictingHost) -> FakeMergingAgent:
    return await host.agent()


class TestSpilling:
    async def test_an_arena_leaves_and_comes_back(
        self, host: EvictingHost, agent: FakeMergingAgent
    ) -> None:
        data = random_pages(PAGES, 1)
        arena = await agent.open("arena", data)
        assert await agent.evict(arena) == (0, PAGES, 0, 0)
        assert len(arena.away) == PAGES == host.spilled()
        agent.fetch(arena, 100, 50)
        await until(lambda: len(arena.away) == PAGES - 50)
        agent.fetch(arena, 0, PAGES)
        await came_back(arena, data)
        await until(lambda: host.elsewhere.returner.returned == PAGES)

    async def test_what_cannot_leave_stays(
        self, host: EvictingHost, agent: FakeMergingAgent
    ) -> None:
        data = random_pages(64, 1)
        data[5] = 0
        arena = await agent.open("arena", data)
        arena.pinned[7] = True
        arena.absent[9] = True

        def write_meanwhile(order: wire.Message) -> None:
            if order.type is wire.Type.EVICT:
                agent.write(arena, 11, b"new")

        agent.before_order = write_meanwhile
        assert await agent.evict(arena) == (0, 60, 4, 0)
        assert set(range(64)) - set(arena.away) == {5, 7, 9, 11}
        assert await agent.evict(arena, 0, 5) == (0, 0, 5, 0)

    async def test_shared_pages_return_from_their_slots(
        self, host: EvictingHost, agent: FakeMergingAgent
    ) -> None:
        data = random_pages(64, 1)
        arenas = [await agent.open(name, data) for name in ("x", "y")]
        await host.merge_all(*arenas)
        assert await agent.evict(arenas[0]) == (0, 64, 0, 0)
        host.assert_exact(agent)
        assert host.elsewhere.spill is not None
        agent.fetch(arenas[0], 0, 64)
        await came_back(arenas[0], data)
        assert host.elsewhere.spill.counts.read == 0
        assert await agent.evict(arenas[0]) == await agent.evict(arenas[1]) == (0, 64, 0, 0)
        assert host.spilled() == 64
        host.assert_exact(agent)
        for arena in arenas:
            agent.fetch(arena, 0, 64)
            await came_back(arena, data)

    async def test_without_room_pages_stay(self, tmp_path: Path) -> None:
        limit = 100 * wire.PAGE_SIZE
        async with evicting_cluster(tmp_path, spill_limit_bytes=limit) as cluster:
            agent = await (await cluster.add("a")).agent()
            data = random_pages(200, 1)
            arena = await agent.open("arena", data)
            held, spilled, kept, no_room = await agent.evict(arena)
            assert held == kept == 0
            assert 80 < spilled < 100 and no_room == 200 - spilled == 200 - len(arena.away)
            agent.fetch(arena, 0, 200)
            await came_back(arena, data)

    async def test_one_that_fails_in_the_middle_is_answered(
        self,
        host: EvictingHost,
        agent: FakeMergingAgent,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        data = random_pages(64, 1)
        arena = await agent.open("arena", data)
        monkeypatch.setattr("samepage.daemon.failpoints._directory", str(tmp_path))
        (tmp_path / "evict.safe").write_text("error")
        with pytest.raises(RefusedError) as refused:
            await agent.evict(arena)
        assert refused.value.args[0] == errno.EAGAIN
        assert not arena.away
        assert await agent.evict(arena) == (0, 64, 0, 0)

    async def test_nowhere_to_go_is_an_error(self, tmp_path: Path) -> None:
        async with evicting_cluster(tmp_path, spill_dir=None, index="") as cluster:
            agent = await (await cluster.add("a")).agent()
            arena = await agent.open("arena", random_pages(4, 1))
            with pytest.raises(RefusedError) as refused:
                await agent.evict(arena)
            assert refused.value.args[0] == errno.EOPNOTSUPP
            assert "set spill_dir" in refused.value.args[1]

    async def test_space_comes_back_when_pages_do(
        self, host: EvictingHost, agent: FakeMergingAgent
    ) -> None:
        data = random_pages(PAGES, 1)
        arena = await agent.open("arena", data)
        await agent.evict(arena)
        agent.fetch(arena, 0, PAGES // 2)
        await until(lambda: len(arena.away) == PAGES // 2)
        await swept(host, lambda: host.spilled() == PAGES // 2)
        agent.fetch(arena, 0, PAGES)
        await came_back(arena, data)
        await agent.evict(arena, 0, 10)
        await agent.close_arena(arena)
        await swept(host, lambda: host.spilled() == 0)

    async def test_a_damaged_file_makes_an_error_and_never_zeros(
        self, host: EvictingHost, agent: FakeMergingAgent, tmp_path: Path
    ) -> None:
        data = random_pages(8, 1)
        arena = await agent.open("arena", data)
        await agent.evict(arena)
        [file] = (tmp_path / "a" / "spill").iterdir()
        with file.open("r+b") as opened:
            opened.seek(-wire.PAGE_SIZE, 2)
            opened.write(bytes(wire.PAGE_SIZE))
        agent.fetch(arena, 0, 8)
        await until(lambda: host.elsewhere.returner.poisoned == 1)
        assert not arena.away
        assert arena.poisoned.tolist() == [False] * 7 + [True]
        for page in range(7):
            assert arena.page(page) == data[page].tobytes()


class TestRestart:
    async def test_spilled_pages_outlive_the_merger(
        self, cluster: EvictingCluster, host: EvictingHost, agent: FakeMergingAgent
    ) -> None:
        data = random_pages(PAGES, 1)
        arena = await agent.open("arena", data)
        await agent.evict(arena)
        await cluster.kill("a")
        await agent.ended.wait()
        again = await cluster.add("a")
        for _ in range(3):
            await again.elsewhere.keeper.sweep()
        assert again.spilled() == PAGES
        await agent.disconnect()
        await agent.connect()
        await agent.announce(arena)
        agent.fetch(arena, 0, PAGES)
        await came_back(arena, data)
        again.connected.append(agent)


class TestHolders:
    async def test_enough_holders_and_nothing_is_written(self, cluster: EvictingCluster) -> None:
        data = random_pages(PAGES, 1)
        holders = [await cluster.with_copy(name, data) for name in "bc"]
        host = await cluster.add("a")
        agent = await host.agent()
        arena = await agent.open("arena", data)
        assert await agent.evict(arena) == (PAGES, 0, 0, 0)
        assert host.spilled() == 0
        assert [len(holder.domain.holds) for holder in holders] == [PAGES, PAGES]
        agent.fetch(arena, 0, PAGES)
        await came_back(arena, data)
        await swept(host, lambda: not any(len(holder.domain.holds) for holder in holders))

    async def test_a_host_that_holds_nothing_is_not_asked_to_go_on(
        self, cluster: EvictingCluster
    ) -> None:
        data = random_pages(10, 1)
        for name in "bc":
            await cluster.with_copy(name, data)
        host = await cluster.add("a")
        agent = await host.agent()
        arena = await agent.open("arena", data)
        assert await agent.evict(arena) == (10, 0, 0, 0)
        await host.elsewhere.keeper.run_once()
        assert sorted(host.elsewhere.grants.hosts()) == ["b", "c"]
        await agent.close_arena(arena)
        await swept(host, lambda: not len(host.elsewhere.grants))
        await host.elsewhere.keeper.run_once()
        assert host.elsewhere.grants.hosts() == []

    async def test_too_few_holders_and_it_is_spilled(self, cluster: EvictingCluster) -> None:
        data = random_pages(100, 1)
        await cluster.with_copy("b", data)
        await cluster.with_copy("c", data[:40])
        agent = await (await cluster.add("a")).agent()
        arena = await agent.open("arena", data)
        assert await agent.evict(arena) == (40, 60, 0, 0)
        agent.fetch(arena, 0, 100)
        await came_back(arena, data)

    @pytest.mark.parametrize("dead", ["b", "c"])
    async def test_killing_any_one_host_loses_nothing(
        self, cluster: EvictingCluster, dead: str
    ) -> None:
        data = random_pages(300, 1)
        for name in "bc":
            await cluster.with_copy(name, data)
        host = await cluster.add("a")
        agent = await host.agent()
        arena = await agent.open("arena", data)
        assert await agent.evict(arena) == (300, 0, 0, 0)
        await cluster.kill(dead)
        del cluster.index.hosts[dead]
        host.hosts._asked_at = 0.0
        await host.elsewhere.keeper.run_once()
        # One holder is left, which is not enough: what it holds was spilled.
        assert host.spilled() == 300
        [other] = {"b", "c"} - {dead}
        await cluster.kill(other)
        del cluster.index.hosts[other]
        agent.fetch(arena, 0, 300)
        await came_back(arena, data)

    async def test_killing_all_holders_is_an_error_and_never_zeros(
        self, cluster: EvictingCluster
    ) -> None:
        data = random_pages(50, 1)
        for name in "bc":
            await cluster.with_copy(name, data)
        host = await cluster.add("a")
        agent = await host.agent()
        arena = await agent.open("arena", data)
        await agent.evict(arena)
        for name in "bc":
            await cluster.kill(name)
        agent.fetch(arena, 0, 50)
        await asyncio.sleep(1)
        assert len(arena.away) == 50, "they have leases: they may come back"
        cluster.index.hosts = {"a": host.address}
        await until(lambda: not arena.away)
        assert arena.poisoned.all()

    async def test_a_restarted_owner_finds_out_who_holds_what(
        self, cluster: EvictingCluster
    ) -> None:
        data = random_pages(300, 1)
        for name in "bc":
            await cluster.with_copy(name, data)
        agent = await (await cluster.add("a")).agent()
        arena = await agent.open("arena", data)
        assert await agent.evict(arena) == (300, 0, 0, 0)
        await cluster.kill("a")
        await agent.ended.wait()
        await agent.disconnect()
        again = await cluster.add("a")
        again.connected.append(agent)
        await agent.connect()
        await agent.announce(arena)
        await again.elsewhere.keeper.run_once()
        grants = again.elsewhere.grants
        assert [grants.of_host(name) for name in "bc"] == [300, 300]
        assert again.spilled() == 0
        agent.fetch(arena, 0, 300)
        await came_back(arena, data)

    async def test_a_holder_that_stops_lets_go(self, cluster: EvictingCluster) -> None:
        data = random_pages(300, 1)
        holders = {name: await cluster.with_copy(name, data) for name in "bc"}
        host = await cluster.add("a")
        agent = await host.agent()
        arena = await agent.open("arena", data)
        await agent.evict(arena)
        await let_go(holders["b"].domains, holders["b"].hosts)
        assert len(holders["b"].domain.holds) == 0
        assert host.spilled() == 300 == host.elsewhere.keeper.secured
        await let_go(holders["c"].domains, holders["c"].hosts)
        assert len(holders["c"].domain.holds) == 0
        for name in "bc":
            await cluster.kill(name)
        agent.fetch(arena, 0, 300)
        await came_back(arena, data)

    async def test_an_owner_that_stops_releases_what_it_does_not_need(
        self, cluster: EvictingCluster
    ) -> None:
        data = random_pages(300, 1)
        holder = await cluster.with_copy("b", data)
        await cluster.with_copy("c", data)
        host = await cluster.add("a")
        agent = await host.agent()
        arena = await agent.open("arena", data)
        await agent.evict(arena)
        agent.fetch(arena, 0, 200)
        await until(lambda: len(arena.away) == 100)
        async with asyncio.timeout(20):
            # Those that have just come are needed until their fetch has ended.
            while len(holder.domain.holds) > 100:
                await host.elsewhere.keeper.retire()
        assert len(holder.domain.holds) == 100
        agent.fetch(arena, 200, 100)
        await came_back(arena, data)

    async def test_what_is_safe_nowhere_else_comes_home(self, tmp_path: Path) -> None:
        async with evicting_cluster(tmp_path, spill_dir=None) as cluster:
            data = random_pages(300, 1)
            for name in "bc":
                await cluster.with_copy(name, data)
            host = await cluster.add("a")
            agent = await host.agent()
            arena = await agent.open("arena", data)
            assert await agent.evict(arena) == (300, 0, 0, 0)
            await cluster.kill("b")
            del cluster.index.hosts["b"]
            host.hosts._asked_at = 0.0
            await host.elsewhere.keeper.run_once()
            await came_back(arena, data)

    async def test_leases_are_renewed(self, cluster: EvictingCluster) -> None:
        data = random_pages(20, 1)
        holders = [await cluster.with_copy(name, data) for name in "bc"]
        host = await cluster.add("a")
        agent = await host.agent()
        await agent.evict(await agent.open("arena", data))
        keeper = host.elsewhere.keeper
        await keeper.run_once()
        before = [lease.expires for holder in holders for lease in holder.domain.holds]
        await keeper.run_once()
        assert [lease.expires for holder in holders for lease in holder.domain.holds] == before
        keeper._renew_seconds = 0.01
        await asyncio.sleep(0.01)
        await keeper.run_once()
        after = [lease.expires for holder in holders for lease in holder.domain.holds]
        assert all(late > early for late, early in zip(after, before, strict=True))


class TestRuns:
    async def test_bad_runs_are_refused(self, host: EvictingHost, agent: FakeMergingAgent) -> None:
        arena = await agent.open("arena", random_pages(8, 1))
        for runs in ([(1, 0, 1)], [(0, 0, 9)], [(0, 8, 1)], [(0, 3, 0)], [(0, 2**63, 1)]):
            with pytest.raises(Exception, match="run"):
                async for _ in host.elsewhere.evictor.evict(
                    "default", [(agent.agent, arena.number)], np.array(runs, RUN).tobytes()
                ):
                    pass
        counts = [
            counts
            async for counts in host.elsewhere.evictor.evict(
                "default",
                [(agent.agent, arena.number), (bytes(16), 7)],
                np.array([(0, 2, 3), (1, 0, 100), (0, 7, 1)], RUN).tobytes(),
            )
        ]
        assert np.sum(counts, axis=0).tolist() == [0, 4, 0, 0]
        assert sorted(arena.away) == [2, 3, 4, 7]
