"""The destination's side of clones: what comes, what is fetched, and what is left when it fails."""

from __future__ import annotations

import asyncio
import errno
import itertools
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes.cloning_agent import CloningAgent
from fakes.fake_merging_agent import RefusedError
from fakes.fake_source import FakeSource, SourceArena
from helpers.cloning import (
    PAGES,
    ZEROS,
    CloningHost,
    cloning_host,
    hang_at,
    nothing_left,
    pages,
    wanted,
)
from helpers.merger_host import store_directory
from helpers.waiting import until

from samepage.daemon import wire
from samepage_merger.cluster.groups import GROUP_PAGES


class TestClone:
    @pytest.fixture(autouse=True, params=["all are new", "older source", "older agent"])
    def generation(
        self, request: pytest.FixtureRequest, source: FakeSource, agent: CloningAgent
    ) -> None:
        """Who was not upgraded yet."""
        source.offers = request.param != "older source"
        agent.knows_absent = request.param != "older agent"

    async def test_bytes_are_equal_and_each_is_fetched_once(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        arena = await agent.clone(wanted())
        assert arena.view() == source.arenas["there"].data.tobytes()
        assert source.sent == PAGES - ZEROS
        assert agent.told[-1] == (PAGES, 0, PAGES - ZEROS, 0, 0)
        assert not arena.away
        await nothing_left(host, source, agent)

    async def test_what_is_here_is_mapped_and_only_the_rest_is_fetched(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        await agent.clone(wanted())
        sent = source.sent
        second = source.arenas["there"].data.copy()
        second[::10] = pages(PAGES // 10, seed=2)
        source.arenas["second"] = SourceArena(second)
        arena = await agent.clone(wanted("second", "second"))
        assert arena.view() == second.tobytes()
        assert source.sent - sent == PAGES // 10
        _, local, fetched, missing, _ = agent.told[-1]
        assert (fetched, missing) == (PAGES // 10, 0)
        assert local + fetched == PAGES - ZEROS + ZEROS // 10
        await nothing_left(host, source, agent)

    async def test_groups_that_are_known_are_mapped_without_a_word_of_their_pages(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        await agent.clone(wanted())
        sent, described = source.sent, source.described
        second = source.arenas["there"].data.copy()
        second[1000] = pages(1, seed=2)
        source.arenas["second"] = SourceArena(second)
        arena = await agent.clone(wanted("second", "second"))
        assert arena.view() == second.tobytes()
        assert source.sent - sent == 1
        if source.offers:
            # That page's group, those with zeros in them, and the last, which is no whole one.
            assert source.described - described == 3 * GROUP_PAGES + PAGES % GROUP_PAGES
        await nothing_left(host, source, agent)

    @pytest.mark.parametrize("lazy", [False, True])
    async def test_the_copy_of_a_sealed_arena_is_sealed(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent, lazy: bool
    ) -> None:
        await agent.clone(wanted())
        assert not agent.sealed
        source.arenas["there"].sealed = True
        arena = await agent.clone(wanted("there", "second", lazy=lazy))
        assert agent.sealed == {arena.number}

    async def test_equal_pages_of_an_arena_are_fetched_once(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        data = np.repeat(pages(6), 1000, axis=0)
        source.arenas["there"] = SourceArena(data)
        arena = await agent.clone(wanted())
        assert arena.view() == data.tobytes()
        assert source.sent == 6
        await nothing_left(host, source, agent)

    async def test_lazy_returns_at_once_and_the_rest_comes_behind(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        reached = asyncio.Event()
        go_on = asyncio.Event()

        async def wait(call: str) -> None:
            if call == "Fetch":
                reached.set()
                await go_on.wait()

        source.before = lambda call, context: wait(call)
        arena = await agent.clone(wanted(lazy=True))
        assert agent.told[-1] == (PAGES, 0, 0, PAGES - ZEROS, 0)
        assert len(source.kept) == PAGES - ZEROS + 1 and not source.snapshots
        await asyncio.wait_for(reached.wait(), 10)
        assert len(arena.away) == PAGES - ZEROS
        go_on.set()
        await until(lambda: not arena.away)
        assert arena.view() == source.arenas["there"].data.tobytes()

    async def test_pages_of_a_lazy_clone_are_away_whatever_the_source_says(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        source.claims = True
        arena = await agent.clone(wanted(lazy=True))
        assert agent.told[-1] == (PAGES, 0, 0, PAGES - ZEROS, 0)
        await until(lambda: not arena.away)
        assert arena.view() == source.arenas["there"].data.tobytes()

    async def test_pages_that_cannot_be_mapped_are_filled(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        agent.mappings = 0
        arena = await agent.clone(wanted())
        assert not arena.slots.any() and not arena.away
        assert arena.view() == source.arenas["there"].data.tobytes()
        await nothing_left(host, source, agent)

    async def test_snapshot_is_kept_for_as_long_as_it_takes(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        async def slow(call: str) -> None:
            if call == "Fetch":
                await until(lambda: bool(source.renewed))

        source.before = lambda call, context: slow(call)
        await agent.clone(wanted())
        assert len(source.renewed) == 1
        await nothing_left(host, source, agent)


class TestFailure:
    @pytest.mark.parametrize(
        ("asked", "number", "text"),
        [
            (wanted(host="host-x"), errno.ENOENT, "host-x"),
            (wanted(host="host-a"), errno.EINVAL, "on this host already"),
            (wanted("missing"), errno.ENOENT, "missing"),
            (wanted(name="a/b"), errno.EINVAL, "a/b"),
            (wanted(domain="-"), errno.EINVAL, "domain"),
            (wanted(name="taken"), errno.EEXIST, "taken"),
            (wanted(lazy=True, migrate=True), errno.EINVAL, "lazy"),
            (wanted(migrate=True, max_freeze_ms=0), errno.EINVAL, "freeze"),
        ],
    )
    async def test_bad_request_is_refused(
        self,
        host: CloningHost,
        source: FakeSource,
        agent: CloningAgent,
        asked: wire.Clone,
        number: int,
        text: str,
    ) -> None:
        await agent.open("taken", pages(1))
        with pytest.raises(RefusedError) as refused:
            await agent.clone(asked)
        assert refused.value.args[0] == number and text in refused.value.args[1]
        await nothing_left(host, source, agent)

    @pytest.mark.parametrize("call", ["Snapshot", "stretch", "Fetch"])
    async def test_source_that_fails_in_the_middle(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent, call: str
    ) -> None:
        calls = itertools.count()

        async def fail(now: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            if now == call and next(calls) == (0 if call == "Snapshot" else 2):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the arena's process is gone")

        source.before = fail
        with pytest.raises(RefusedError) as refused:
            await agent.clone(wanted())
        assert refused.value.args[0] == errno.EAGAIN
        await nothing_left(host, source, agent)

    async def test_source_that_dies_and_comes_back(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        reached = asyncio.Event()

        async def hang(call: str) -> None:
            if call == "Fetch":
                reached.set()
                await asyncio.Event().wait()

        source.before = lambda call, context: hang(call)
        cloning = asyncio.ensure_future(agent.clone(wanted()))
        await asyncio.wait_for(reached.wait(), 10)
        await source.stop()
        with pytest.raises(RefusedError) as refused:
            await cloning
        assert refused.value.args[0] == errno.EAGAIN
        host.assert_exact(agent)
        assert len(host.journal.read()) == 1
        source.before = None
        await source.start()
        await nothing_left(host, source, agent)

    async def test_agent_that_gives_up(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        asked = wanted()
        reached = hang_at(source, "Fetch")
        seq = agent.ask(asked, 1)
        counts = await agent.news(seq)
        arena = await agent.make(asked, 1, counts[0])
        await asyncio.wait_for(reached.wait(), 10)
        await agent.close_arena(arena)
        source.before = None
        await nothing_left(host, source, agent)

    async def test_agent_that_dies(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        asked = wanted()
        reached = hang_at(source, "Fetch")
        seq = agent.ask(asked, 1)
        counts = await agent.news(seq)
        await agent.make(asked, 1, counts[0])
        await asyncio.wait_for(reached.wait(), 10)
        await agent.die()
        source.before = None
        await nothing_left(host, source, agent)

    async def test_merger_that_dies_tells_the_source_when_it_is_back(
        self, tmp_path: Path, source: FakeSource
    ) -> None:
        with store_directory() as store:
            async with cloning_host(tmp_path, store, source) as host:
                agent = CloningAgent(host.path)
                await agent.connect()
                reached = hang_at(source, "Fetch")
                asked = wanted()
                seq = agent.ask(asked, 1)
                counts = await agent.news(seq)
                await agent.make(asked, 1, counts[0])
                await asyncio.wait_for(reached.wait(), 10)
                await host.kill()
                await agent.die()
            assert len(source.snapshots) == 1
            source.before = None
            async with cloning_host(tmp_path, store, source) as host:
                await nothing_left(host, source, agent)

    async def test_store_without_room(self, tmp_path: Path, source: FakeSource) -> None:
        with store_directory() as store:
            async with cloning_host(tmp_path, store, source, limit_bytes=1 << 20) as host:
                agent = CloningAgent(host.path)
                await agent.connect()
                with pytest.raises(RefusedError) as refused:
                    await agent.clone(wanted())
                assert refused.value.args[0] == errno.ENOSPC
                await nothing_left(host, source, agent)
                await agent.die()

    async def test_host_without_memory(self, tmp_path: Path, source: FakeSource) -> None:
        with store_directory() as store:
            async with cloning_host(tmp_path, store, source, available=lambda: 1 << 20) as host:
                agent = CloningAgent(host.path)
                await agent.connect()
                with pytest.raises(RefusedError) as refused:
                    await agent.clone(wanted())
                assert refused.value.args[0] == errno.ENOMEM
                await nothing_left(host, source, agent)
                await agent.die()
