"""The destination's side of migrations: one owner at each instant, with all bytes."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.cloning_agent import CloningAgent
from fakes.fake_merging_agent import RefusedError
from fakes.fake_source import FakeSource
from helpers.cloning import (
    PAGES,
    SOURCE,
    CloningHost,
    cloning_host,
    nothing_left,
    pages,
    wanted,
)
from helpers.merger_host import store_directory
from helpers.waiting import until

from samepage.daemon import wire
from samepage.errors import InvalidArgumentError

MIGRATE = wanted(migrate=True, max_freeze_ms=20_000)
#: With a freeze that is soon over, and how long until it is.
SHORT = wanted(migrate=True, max_freeze_ms=2_000)
SHORT_SECONDS = 2.1


class TestMigrate:
    async def test_what_is_written_meanwhile_comes_too(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        there = source.arenas["there"]
        rounds = []

        async def write(call: str) -> None:
            if call in ("Snapshot", "Freeze"):
                rounds.append(call)
                if len(rounds) < 5:
                    for number, page in enumerate(pages(50, seed=len(rounds))):
                        there.write(number * 7 + len(rounds), page.tobytes())
                    there.write(2000 + len(rounds), bytes(wire.PAGE_SIZE))
                    there.write(60 + len(rounds), b"\1" * wire.PAGE_SIZE)
                    there.write(59 + len(rounds), bytes(wire.PAGE_SIZE))

        source.before = lambda call, context: write(call)
        arena = await agent.clone(MIGRATE)
        assert rounds[-1] == "Freeze" and "Snapshot" in rounds
        assert arena.view() == there.data.tobytes()
        assert there.left and not arena.away
        *_, freeze_us = agent.told[-1]
        assert 0 < freeze_us < MIGRATE.max_freeze_ms * 1000
        await until(lambda: not source.snapshots)
        host.assert_exact(agent)

    async def test_source_that_writes_faster_than_pages_come_keeps_the_arena(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        there = source.arenas["there"]

        async def stall(call: str) -> None:
            if call == "Freeze":
                there.write(1, b"\1" * wire.PAGE_SIZE)
            if call == "stretch" and there.written == {1}:
                await asyncio.sleep(SHORT_SECONDS)

        source.before = lambda call, context: stall(call)
        with pytest.raises(RefusedError) as refused:
            await agent.clone(SHORT)
        assert refused.value.args[0] == errno.ETIMEDOUT and "2000 ms" in refused.value.args[1]
        assert not there.left
        await nothing_left(host, source, agent)

    @pytest.mark.parametrize("call", ["Snapshot", "Fetch", "Freeze"])
    async def test_failure_before_the_freeze_is_over_leaves_the_source_the_owner(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent, call: str
    ) -> None:
        async def fail(now: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            if now == call:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "pages are pinned")

        source.before = fail
        with pytest.raises(RefusedError) as refused:
            await agent.clone(MIGRATE)
        assert refused.value.args[0] == errno.EBUSY
        assert not source.arenas["there"].left
        await nothing_left(host, source, agent)

    async def test_lost_answer_of_leave_is_asked_for_again(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        lost: list[str] = []

        async def lose(call: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            if call == "Left" and len(lost) < 3:
                lost.append(call)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "lost on the way")

        source.before = lose
        arena = await agent.clone(MIGRATE)
        assert len(lost) == 3 and source.arenas["there"].left
        assert arena.view() == source.arenas["there"].data.tobytes()

    async def test_leave_that_comes_too_late_leaves_the_source_the_owner(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        async def late(call: str) -> None:
            if call == "Leave":
                await asyncio.sleep(SHORT_SECONDS)

        source.before = lambda call, context: late(call)
        with pytest.raises(RefusedError) as refused:
            await agent.clone(SHORT)
        assert refused.value.args[0] == errno.ETIMEDOUT
        assert not source.arenas["there"].left
        await nothing_left(host, source, agent)

    async def test_source_that_is_cut_off_from_everybody_stays_the_owner(
        self,
        host: CloningHost,
        source: FakeSource,
        agent: CloningAgent,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It never heard that it should leave, and its application goes on."""
        there = source.arenas["there"]
        asked = await self._cut_off(host, source, monkeypatch)
        cloning = asyncio.ensure_future(agent.clone(SHORT))
        await asked.wait()
        await asyncio.sleep(SHORT_SECONDS)
        there.write(7, b"\2" * wire.PAGE_SIZE)
        assert not cloning.done()
        source.before = None
        host.hosts.gone = False
        with pytest.raises(RefusedError) as refused:
            await cloning
        assert refused.value.args[0] == errno.ETIMEDOUT
        assert not there.left
        await nothing_left(host, source, agent)

    async def test_source_that_is_gone_has_left_when_an_operator_says_so(
        self,
        host: CloningHost,
        source: FakeSource,
        agent: CloningAgent,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked = await self._cut_off(host, source, monkeypatch)
        cloning = asyncio.ensure_future(agent.clone(MIGRATE))
        await asked.wait()
        host.hosts.gone = False
        with pytest.raises(InvalidArgumentError, match="is in the cluster"):
            await host.handovers.forget_host(SOURCE)
        host.hosts.gone = True
        assert await host.handovers.forget_host("another") == 0
        assert await host.handovers.forget_host(SOURCE) == 1
        arena = await cloning
        assert arena.view() == source.arenas["there"].data.tobytes()

    async def _cut_off(
        self, host: CloningHost, source: FakeSource, monkeypatch: pytest.MonkeyPatch
    ) -> asyncio.Event:
        """Nothing reaches the source from when it should leave; the event says that it should."""
        monkeypatch.setattr("samepage_merger.cluster.handover._GONE_SECONDS", 0.0)
        asked = asyncio.Event()

        async def cut(call: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            if call in ("Leave", "EndSnapshot"):
                host.hosts.gone = True
                asked.set()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "no route to host")

        source.before = cut
        return asked

    async def test_source_that_only_the_index_lost_is_asked_still(
        self,
        host: CloningHost,
        source: FakeSource,
        agent: CloningAgent,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("samepage_merger.cluster.handover._GONE_SECONDS", 0.0)

        async def lose_the_lease(call: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            host.hosts.gone = host.hosts.gone or call == "Freeze"

        source.before = lose_the_lease
        arena = await agent.clone(MIGRATE)
        assert source.arenas["there"].left
        assert arena.view() == source.arenas["there"].data.tobytes()


class TestHandOver:
    """From the moment that the source is asked to leave, nobody gives up."""

    @pytest.mark.parametrize("left", [True, False])
    async def test_agent_that_lost_its_connection_asks_again(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent, left: bool
    ) -> None:
        await self._until_leaving(source, agent, left=left)
        await agent.disconnect()
        await agent.connect()
        arena = agent.arenas[1]
        await agent.announce(arena)
        if not left:
            await asyncio.sleep(SHORT_SECONDS)
        seq = agent.ask(MIGRATE, 1)
        self.go_on.set()
        if left:
            assert await agent.until_cloned(seq) == (PAGES, 0, 0, 0, agent.told[-1][-1])
            assert arena.view() == source.arenas["there"].data.tobytes()
            assert len(host.journal.read()) == 1
            await agent.close_arena(arena)
        else:
            with pytest.raises(RefusedError):
                await agent.until_cloned(seq)
            await agent.close_arena(arena)
        assert bool(source.arenas["there"].left) is left
        await nothing_left(host, source, agent)

    @pytest.mark.parametrize("left", [True, False])
    async def test_merger_that_dies_asks_again(
        self, tmp_path: Path, source: FakeSource, left: bool
    ) -> None:
        with store_directory() as store:
            async with cloning_host(tmp_path, store, source) as host:
                agent = CloningAgent(host.path)
                await agent.connect()
                await self._until_leaving(source, agent, left=left)
                await host.kill()
                await agent.disconnect()
                if not left:
                    await asyncio.sleep(SHORT_SECONDS)
                self.go_on.set()
            async with cloning_host(tmp_path, store, source) as host:
                await agent.connect()
                arena = agent.arenas[1]
                await agent.announce(arena)
                seq = agent.ask(MIGRATE, 1)
                if left:
                    await agent.until_cloned(seq)
                    assert arena.view() == source.arenas["there"].data.tobytes()
                else:
                    with pytest.raises(RefusedError):
                        await agent.until_cloned(seq)
                assert bool(source.arenas["there"].left) is left
                await agent.close_arena(arena)
                await nothing_left(host, source, agent)
                await agent.die()

    async def test_arena_of_a_process_that_died_meanwhile_is_forgotten(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        await self._until_leaving(source, agent, left=True)
        await agent.die()
        self.go_on.set()
        await nothing_left(host, source, agent)

    async def test_asking_again_for_what_nobody_knows_is_refused(
        self, host: CloningHost, source: FakeSource, agent: CloningAgent
    ) -> None:
        await agent.open("here", pages(3))
        seq = agent.ask(MIGRATE, 1)
        with pytest.raises(RefusedError) as refused:
            await agent.until_cloned(seq)
        assert refused.value.args[0] == errno.ENOENT

    async def _until_leaving(self, source: FakeSource, agent: CloningAgent, *, left: bool) -> None:
        """Migrate until the source is asked to leave, which it answers when `go_on` is set: before
        it has left, or afterwards."""
        self.go_on = asyncio.Event()
        reached = asyncio.Event()
        asked = MIGRATE if left else SHORT

        async def hold(call: str) -> None:
            if call == ("Left" if left else "Leave"):
                reached.set()
                await self.go_on.wait()

        source.before = lambda call, context: hold(call)
        seq = agent.ask(asked, 1)
        counts = await agent.news(seq)
        await agent.make(asked, 1, counts[0])
        async with asyncio.timeout(20):
            await reached.wait()
