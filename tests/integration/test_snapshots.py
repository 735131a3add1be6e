"""Snapshots, freezing and leaving, over real gRPC, with agents that are honest models."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent
from helpers.pages_host import (
    DOMAIN_ID,
    PagesCluster,
    PagesHost,
    digests_of,
    fingerprints_of,
    pages_cluster,
    random_pages,
)
from helpers.waiting import until

from samepage.daemon import wire
from samepage.daemon.wire import PAGE_SIZE
from samepage.v1 import pages_pb2
from samepage_merger.cluster.offers import FIRST_PAGES, OFFER_PAGES
from samepage_merger.cluster.process import identify
from samepage_merger.store import LIFE_BYTES

PAGES = 1300
LEASE_MS = 60_000


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[PagesCluster]:
    async with pages_cluster(tmp_path, "a", "b") as cluster:
        yield cluster


@pytest.fixture
def host(cluster: PagesCluster) -> PagesHost:
    return cluster.hosts["a"]


@pytest.fixture
async def agent(host: PagesHost) -> AsyncIterator[FakeMergingAgent]:
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    yield agent
    await agent.die()


class Copy:
    """What the owner of a snapshot knows."""

    def __init__(self, host: PagesHost) -> None:
        self.host = host
        self.id = b""
        self.digests = np.zeros((0, 32), np.uint8)
        self.told = 0

    async def snapshot(self, arena: str = "arena") -> None:
        """One round."""
        if self.id:
            request = pages_pb2.SnapshotRequest(snapshot_id=self.id)
        else:
            request = pages_pb2.SnapshotRequest(domain_id=DOMAIN_ID, arena=arena)
        request.owner, request.lease_ms = "b", LEASE_MS
        await self._take(self.host.pages.Snapshot(request))

    async def freeze(self, milliseconds: int = 20_000) -> None:
        request = pages_pb2.FreezeRequest(snapshot_id=self.id, milliseconds=milliseconds)
        await self._take(self.host.pages.Freeze(request))

    async def leave(self) -> bool:
        answer = await self.host.pages.Leave(pages_pb2.LeaveRequest(snapshot_id=self.id))
        return answer.left

    async def end(self, keep_holds: bool = False) -> None:
        await self.host.pages.EndSnapshot(
            pages_pb2.EndSnapshotRequest(snapshot_id=self.id, keep_holds=keep_holds)
        )

    async def bytes(self) -> list[bytes]:
        """Fetch the pages, as the owner would."""
        pages = []
        for low in range(0, len(self.digests), 256):
            part = self.digests[low : low + 256]
            stream = self.host.pages.Fetch()
            await stream.write(pages_pb2.FetchRequest(domain_id=DOMAIN_ID, digests=part.tobytes()))
            response = await stream.read()
            stream.cancel()
            assert isinstance(response, pages_pb2.FetchResponse)
            data = iter(range(0, len(response.pages), PAGE_SIZE))
            for digest, found in zip(part, response.found, strict=True):
                assert found or not digest.any()
                at = next(data) if found else 0
                pages.append(response.pages[at : at + PAGE_SIZE] if found else bytes(PAGE_SIZE))
        return pages

    async def _take(self, call: Any) -> None:
        self.told = 0
        last = -1
        async for response in call:
            self.id = response.snapshot_id
            if not len(self.digests):
                self.digests = np.zeros((response.pages, 32), np.uint8)
            digests = np.frombuffer(response.digests, np.uint8).reshape(-1, 32)
            assert len(response.fingerprints) * 2 == len(response.digests)
            if len(digests):
                assert response.first_page > last
                last = response.first_page + len(digests) - 1
            self.digests[response.first_page : response.first_page + len(digests)] = digests
            self.told += len(digests)


def as_pages(arena: FakeArena) -> list[bytes]:
    return [arena.page(page) for page in range(arena.pages)]


async def refused(call: Any, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    return caught.value.details() or ""


async def test_snapshot_holds_what_an_arena_has(host: PagesHost, agent: FakeMergingAgent) -> None:
    data = random_pages(PAGES, 1)
    data[100:200] = 0
    arena = await agent.open("arena", data)
    arena.absent[150:160] = True
    copy = Copy(host)
    await copy.snapshot()
    assert copy.told == PAGES
    assert copy.digests.tolist() == digests_of(data).tolist()
    assert arena.absent[100:200].all()
    assert int(np.count_nonzero(arena.slots)) == PAGES - 100
    assert host.domain.store.resident_bytes() == (PAGES - 100) * PAGE_SIZE
    assert host.domain.books.shared_pages() == PAGES - 100
    for page in range(50, 60):
        agent.write(arena, page, b"something else")
    await agent.flushed()
    assert await copy.bytes() == [page.tobytes() for page in data]
    await copy.end()
    assert host.domain.store.resident_bytes() == (PAGES - 110) * PAGE_SIZE
    host.assert_exact(agent)


async def test_fingerprints_are_those_of_the_agents(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(10, 1)
    await agent.open("arena", data)
    call = host.pages.Snapshot(
        pages_pb2.SnapshotRequest(domain_id=DOMAIN_ID, arena="arena", owner="b", lease_ms=LEASE_MS)
    )
    seen = [response async for response in call]
    assert (seen[0].pages, seen[0].digests) == (10, b"")
    assert seen[1].fingerprints == fingerprints_of(data).tobytes()


async def test_later_rounds_tell_of_what_was_written(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(PAGES, 1)
    data[100:200] = 0
    arena = await agent.open("arena", data)
    arena.absent[:50] = True
    arena.data[:50] = 0
    copy = Copy(host)
    await copy.snapshot()
    await copy.snapshot()
    assert copy.told == 0
    agent.write(arena, 7, b"an absent page")
    agent.write(arena, 120, b"a page of zeros")
    for page in (300, 301, 999):
        agent.write(arena, page, b"a shared page")
    agent.write(arena, 400, arena.page(400)[:20])
    await agent.flushed()
    await copy.snapshot()
    assert copy.told == 5
    assert await copy.bytes() == as_pages(arena)
    await copy.snapshot()
    assert copy.told == 0


async def test_pages_that_cannot_be_replaced_are_copied(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    arena = await agent.open("arena", random_pages(PAGES, 1))
    arena.pinned[10:20] = True
    copy = Copy(host)
    await copy.snapshot()
    assert await copy.bytes() == as_pages(arena)
    await copy.snapshot()
    assert copy.told == 0
    arena.data[13] ^= 5
    await copy.snapshot()
    assert copy.told == 1
    assert await copy.bytes() == as_pages(arena)
    details = await refused(copy.freeze(), grpc.StatusCode.FAILED_PRECONDITION)
    assert ("pinned" in details, arena.frozen) == (True, False)
    arena.pinned[:] = False
    await copy.freeze()
    assert arena.slots.all()


async def test_snapshots_of_pages_that_are_shared_already(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(PAGES, 1)
    arena = await agent.open("arena", data)
    twin = await agent.open("twin", data)
    await host.merge_all(arena, twin)
    one, other = Copy(host), Copy(host)
    await one.snapshot()
    await other.snapshot("twin")
    assert host.domain.store.resident_bytes() == PAGES * PAGE_SIZE
    agent.write(arena, 0, b"gone", PAGES)
    agent.write(twin, 0, b"gone as well", PAGES)
    await agent.flushed()
    await one.end()
    assert await other.bytes() == [page.tobytes() for page in data]
    await other.end()
    assert host.domain.store.resident_bytes() == 0


async def test_ended_snapshot_may_keep_its_holds(host: PagesHost, agent: FakeMergingAgent) -> None:
    data = random_pages(PAGES, 1)
    arena = await agent.open("arena", data)
    copy = Copy(host)
    await copy.snapshot()
    await copy.end(keep_holds=True)
    await agent.close_arena(arena)
    assert await copy.bytes() == [page.tobytes() for page in data]
    answer = await host.pages.Renew(pages_pb2.RenewRequest(owner="b", lease_ms=1000))
    assert answer.holds == PAGES
    await refused(copy.snapshot(), grpc.StatusCode.NOT_FOUND)
    await copy.end()


async def test_no_such_arena(host: PagesHost, agent: FakeMergingAgent) -> None:
    await agent.open("arena", random_pages(3, 1))
    await refused(Copy(host).snapshot("another"), grpc.StatusCode.NOT_FOUND)
    nobody = Copy(host)
    nobody.id = bytes(16)
    await refused(nobody.snapshot(), grpc.StatusCode.NOT_FOUND)
    await refused(nobody.freeze(), grpc.StatusCode.NOT_FOUND)
    await nobody.end()
    await agent.disconnect()
    await until(lambda: not len(host.agents))
    await refused(Copy(host).snapshot(), grpc.StatusCode.UNAVAILABLE)


async def test_store_without_room(host: PagesHost, agent: FakeMergingAgent) -> None:
    await agent.open("arena", random_pages(PAGES, 1))
    host.stores.limit(600 * PAGE_SIZE)
    copy = Copy(host)
    details = await refused(copy.snapshot(), grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert "store_limit_bytes" in details
    await copy.end()


@pytest.mark.parametrize("milliseconds", [0, 60_001])
async def test_freeze_for_no_time(
    host: PagesHost, agent: FakeMergingAgent, milliseconds: int
) -> None:
    await agent.open("arena", random_pages(3, 1))
    copy = Copy(host)
    await copy.snapshot()
    await refused(copy.freeze(milliseconds), grpc.StatusCode.INVALID_ARGUMENT)


async def test_frozen_arena_is_left(host: PagesHost, agent: FakeMergingAgent) -> None:
    arena = await agent.open("arena", random_pages(PAGES, 1))
    copy = Copy(host)
    await copy.snapshot()
    for page in range(70, 90):
        agent.write(arena, page, b"written meanwhile")
    await agent.flushed()
    before = as_pages(arena)
    await copy.freeze()
    assert copy.told == 20
    assert await copy.leave()
    assert arena.left == copy.id and arena.poisoned.all()
    assert host.domain.books.shared_pages() == 0
    assert await copy.bytes() == before
    assert await copy.leave()
    await refused(Copy(host).snapshot(), grpc.StatusCode.NOT_FOUND)
    await copy.end()
    assert host.domain.store.resident_bytes() == 0
    assert await copy.leave()


@pytest.mark.parametrize("known", ["by its answer", "by its announcement", "before a restart"])
async def test_arena_is_left_to_one_host_alone(cluster: PagesCluster, known: str) -> None:
    """Whoever was cut off, and asks when the process has ended, does not get it as well."""
    host = cluster.hosts["a"]
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    arena = await agent.open("arena", random_pages(30, 1))
    late, copy = Copy(host), Copy(host)
    await late.snapshot()
    await late.freeze()
    await copy.snapshot()
    await copy.freeze()
    if known != "by its announcement":
        assert await copy.leave()
    else:
        arena.left, arena.slots[:], arena.poisoned[:] = copy.id, 0, True
        await agent.disconnect()
        await agent.connect()
        await agent.announce(arena)
    await agent.die()
    if known == "before a restart":
        await cluster.kill("a")
        late.host = copy.host = host = await cluster.add("a")
    await host.settled()
    assert not await late.leave()
    assert await copy.leave()


async def test_arena_stays_when_the_freeze_is_over(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    arena = await agent.open("arena", random_pages(20, 1))
    copy = Copy(host)
    await copy.snapshot()
    assert not await copy.leave()
    await copy.freeze()
    arena.frozen = False
    assert not await copy.leave()
    assert not await copy.leave()
    await copy.end()
    host.assert_exact(agent)


async def test_ending_a_snapshot_thaws(host: PagesHost, agent: FakeMergingAgent) -> None:
    arena = await agent.open("arena", random_pages(20, 1))
    copy = Copy(host)
    await copy.snapshot()
    await copy.freeze()
    assert arena.frozen
    await copy.end()
    assert not arena.frozen


async def test_older_library_is_copied_but_not_migrated(host: PagesHost) -> None:
    agent = FakeMergingAgent(host.path, version=2)
    await agent.connect()
    arena = await agent.open("arena", random_pages(20, 1))
    copy = Copy(host)
    await copy.snapshot()
    assert await copy.bytes() == as_pages(arena)
    await refused(copy.freeze(), grpc.StatusCode.FAILED_PRECONDITION)
    await agent.die()


async def test_what_devices_write_is_told_of_before_the_freeze_ends(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    """A page that was pinned for a device can be written in a freeze until it is replaced."""
    arena = await agent.open("arena", random_pages(600, 1))
    copy = Copy(host)
    writes = 0

    def write(order: wire.Message) -> None:
        nonlocal writes
        if arena.frozen and order.type is wire.Type.REPLACE and writes < 5:
            writes += 1
            arena.data[1] ^= writes

    await copy.snapshot()
    for page in range(20):
        agent.write(arena, page, b"private again")
    await agent.flushed()
    agent.before_order = write
    await copy.freeze()
    assert writes == 5
    assert arena.slots.all()
    assert await copy.bytes() == as_pages(arena)


async def test_leaving_is_known_after_lost_answers_and_restarts(cluster: PagesCluster) -> None:
    """The merger is killed between the order to leave and its answer."""
    host = cluster.hosts["a"]
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    arena = await agent.open("arena", random_pages(300, 1))
    before = as_pages(arena)
    copy = Copy(host)
    await copy.snapshot()
    await copy.freeze()
    agent.obey.clear()
    asked = asyncio.ensure_future(copy.leave())
    await agent.until_ordered(wire.Type.LEAVE)
    await agent.disconnect()
    await refused(asked, grpc.StatusCode.UNAVAILABLE)
    await cluster.kill("a")
    host = copy.host = await cluster.add("a")
    details = await refused(copy.leave(), grpc.StatusCode.UNAVAILABLE)
    assert "announce" in details
    # What the agent did before its connection broke.
    arena.left = copy.id
    arena.slots[:] = 0
    arena.poisoned[:] = True
    agent.obey.set()
    await agent.connect()
    await agent.announce(arena)
    assert await copy.leave()
    assert await copy.bytes() == before
    await agent.die()
    await host.settled()
    assert await copy.leave()


async def test_arena_that_did_not_leave_stays_after_a_restart(cluster: PagesCluster) -> None:
    host = cluster.hosts["a"]
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    arena = await agent.open("arena", random_pages(300, 1))
    copy = Copy(host)
    await copy.snapshot()
    await copy.freeze()
    await agent.disconnect()
    await cluster.kill("a")
    host = copy.host = await cluster.add("a")
    await refused(copy.leave(), grpc.StatusCode.UNAVAILABLE)
    arena.frozen = False
    await agent.connect()
    await agent.announce(arena)
    assert not await copy.leave()
    await copy.end()
    await host.settled()
    host.assert_exact(agent)
    await agent.die()


async def test_leaving_when_the_snapshots_store_is_gone(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    """A merger on a new store knows of an arena what its process says, and nothing before that."""
    arena = await agent.open("arena", random_pages(4, 1))
    life = host.domains.store_id[:LIFE_BYTES]
    asked = pages_pb2.LeaveRequest(
        snapshot_id=b"s" * 16, store_id=life.ljust(16), agent=agent.agent, arena=arena.number
    )
    assert not (await host.pages.Leave(asked)).left
    await agent.disconnect()
    await until(lambda: not len(host.agents))
    await refused(host.pages.Leave(asked), grpc.StatusCode.UNAVAILABLE)
    # Its process has ended: then nobody will ever say, but it may have left to a third host.
    with subprocess.Popen(["true"]) as ended:
        process = identify(ended.pid)
    asked.process.CopyFrom(pages_pb2.Process(**asdict(process)))
    await refused(host.pages.Leave(asked), grpc.StatusCode.NOT_FOUND)
    asked.process.CopyFrom(pages_pb2.Process(**asdict(identify(os.getpid()))))
    await refused(host.pages.Leave(asked), grpc.StatusCode.UNAVAILABLE)
    # Of another life of the machine nothing is left but the copy.
    asked.store_id = b"another life...."
    assert (await host.pages.Leave(asked)).left


async def test_unanswered_order_to_leave_is_not_known(
    host: PagesHost, agent: FakeMergingAgent
) -> None:
    arena = await agent.open("arena", random_pages(30, 1))
    copy = Copy(host)
    await copy.snapshot()
    await copy.freeze()
    host.orders._timeout = 0.05
    agent.obey.clear()
    await refused(copy.leave(), grpc.StatusCode.UNAVAILABLE)
    await refused(copy.leave(), grpc.StatusCode.UNAVAILABLE)
    host.orders._timeout = 5.0
    agent.obey.set()
    await until(lambda: any(arena.left))
    await agent.flushed()
    assert await copy.leave()


async def test_process_that_ends_in_the_middle(host: PagesHost, agent: FakeMergingAgent) -> None:
    await agent.open("arena", random_pages(PAGES, 1))

    def die(order: wire.Message) -> None:
        if agent.orders.count(wire.Type.READ) == 2:
            raise OSError(errno.EPIPE, "the process is killed here")

    agent.before_order = die
    copy = Copy(host)
    asked = asyncio.ensure_future(copy.snapshot())
    await agent.until_ordered(wire.Type.READ, 2)
    await agent.die()
    await refused(asked, grpc.StatusCode.UNAVAILABLE)
    await host.settled()
    await copy.end()
    assert host.domain.store.resident_bytes() == 0


async def test_away_pages_are_brought_back_for_a_snapshot(
    cluster: PagesCluster, host: PagesHost, agent: FakeMergingAgent
) -> None:
    data = random_pages(40, 1)
    arena = await agent.open("arena", data)
    digests = digests_of(data)
    cluster.hosts["b"].keep(data[:20], owner="a")
    pages = np.arange(20)
    outcomes = await host.orders.evict(
        host.agents.find(agent.agent, arena.number),  # type: ignore[arg-type]
        pages,
        data[:20].tobytes(),
        digests[:20],
    )
    assert not outcomes.any()
    copy = Copy(host)
    await copy.snapshot()
    assert copy.digests.tolist() == digests.tolist()
    assert await copy.bytes() == [page.tobytes() for page in data]
    assert sorted(arena.away) == list(range(20))
    await copy.snapshot()
    assert copy.told == 0
    await copy.freeze()
    await cluster.kill("b")
    another = Copy(host)
    await copy.end()
    host.hosts._asked_at = float("-inf")
    await refused(another.snapshot(), grpc.StatusCode.UNAVAILABLE)
    await another.end()


class TestOffers:
    """Snapshots whose owner takes each page at once."""

    @pytest.fixture
    def request_(self) -> pages_pb2.SnapshotRequest:
        return pages_pb2.SnapshotRequest(
            domain_id=DOMAIN_ID, arena="arena", owner="b", lease_ms=LEASE_MS, offer=True
        )

    async def fetched(self, host: PagesHost, digests: bytes) -> pages_pb2.FetchResponse:
        stream = host.pages.Fetch()
        await stream.write(pages_pb2.FetchRequest(domain_id=DOMAIN_ID, digests=digests))
        response = await stream.read()
        stream.cancel()
        assert isinstance(response, pages_pb2.FetchResponse)
        return response

    async def test_pages_are_offered_until_they_are_taken(
        self, host: PagesHost, agent: FakeMergingAgent, request_: pages_pb2.SnapshotRequest
    ) -> None:
        data = random_pages(OFFER_PAGES + 100, 1)
        data[50:70] = 0
        arena = await agent.open("arena", data)
        arena.absent[60:70] = True
        # Whether a page is shared makes no difference.
        twin = await agent.open("twin", data[:40])
        await host.merge([arena, twin], [(0, 1, 10, 10, 20)])
        assert arena.slots.any()
        resident = host.domain.store.resident_bytes()
        call = host.pages.Snapshot(request_)
        told, waiting = 0, list[pages_pb2.SnapshotResponse]()
        async for response in call:
            digests = np.frombuffer(response.digests, np.uint8).reshape(-1, 32)
            if not len(digests):
                assert not response.offered or waiting
                continue
            assert response.offered and response.first_page == told
            here = data[told : told + len(digests)]
            assert digests.tolist() == digests_of(here).tolist()
            told += len(digests)
            waiting.append(response)
            if len(waiting) < 2 and told < len(data):
                continue
            for each in waiting:
                await self.taken(host, each)
            waiting.clear()
        assert told == len(data)
        assert host.domain.store.resident_bytes() == resident
        await self.until_gone(host, response.digests)

    async def next(self, call: Any) -> pages_pb2.SnapshotResponse:
        """The next response."""
        response = await call.read()
        assert isinstance(response, pages_pb2.SnapshotResponse)
        return response

    async def taken(self, host: PagesHost, response: pages_pb2.SnapshotResponse) -> None:
        """Fetch a part of a stretch in another order, then let it go."""
        wanted = np.frombuffer(response.digests, np.uint8).reshape(-1, 32)
        wanted = wanted[wanted.any(axis=1)][:90]
        for part in (wanted, wanted[::-1], wanted[1::7]):
            answer = await self.fetched(host, part.tobytes())
            assert answer.found == bytes([1]) * len(part)
            pages = np.frombuffer(answer.pages, np.uint8).reshape(-1, PAGE_SIZE)
            assert digests_of(pages).tolist() == part.tolist()
        for _ in range(2):
            await host.pages.Taken(
                pages_pb2.TakenRequest(
                    snapshot_id=response.snapshot_id, first_page=response.first_page
                )
            )

    async def until_gone(self, host: PagesHost, digests: bytes) -> None:
        """Wait until a page is not offered any more."""
        while (await self.fetched(host, digests[:32])).found != b"\0":
            await asyncio.sleep(0)

    async def test_no_more_than_a_few_stretches_are_offered_at_a_time(
        self, host: PagesHost, agent: FakeMergingAgent, request_: pages_pb2.SnapshotRequest
    ) -> None:
        await agent.open("arena", random_pages(5 * FIRST_PAGES, 1))
        call = host.pages.Snapshot(request_)
        stretches = [await self.next(call) for _ in range(3)][1:]
        snapshot_id = stretches[0].snapshot_id
        third = asyncio.ensure_future(self.next(call))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(third), 0.5)
        await host.pages.Taken(pages_pb2.TakenRequest(snapshot_id=snapshot_id))
        assert (await third).first_page == 2 * FIRST_PAGES
        call.cancel()
        for stretch in stretches:
            await self.until_gone(host, stretch.digests)

    async def test_later_bytes_are_not_sent_for_a_digest(
        self, host: PagesHost, agent: FakeMergingAgent, request_: pages_pb2.SnapshotRequest
    ) -> None:
        data = random_pages(10, 1)
        arena = await agent.open("arena", data.copy())
        call = host.pages.Snapshot(request_)
        stretch = [await self.next(call) for _ in range(2)][1]
        arena.data[3] ^= 5
        answer = await self.fetched(host, stretch.digests)
        assert answer.pages == data.tobytes()
        assert not arena.slots.any()
        await host.pages.Taken(pages_pb2.TakenRequest(snapshot_id=stretch.snapshot_id))
        assert await call.read() == grpc.aio.EOF

    async def test_groups_are_told_of_and_described(
        self, host: PagesHost, agent: FakeMergingAgent, request_: pages_pb2.SnapshotRequest
    ) -> None:
        data = random_pages(FIRST_PAGES + 300, 1)
        data[:128] = 0
        await agent.open("arena", data)
        digests = digests_of(data)
        request_.group = True
        call = host.pages.Snapshot(request_)
        first, last = [await self.next(call) for _ in range(3)][1:]
        assert (first.group_pages, last.group_pages) == (FIRST_PAGES, 300)
        assert not (first.digests or first.fingerprints)
        assert first.groups[:32] == bytes(32)
        assert len(first.groups) == FIRST_PAGES // 128 * 32 and len(last.groups) == 3 * 32

        def describe(groups: bytes) -> Any:
            return host.pages.Describe(
                pages_pb2.DescribeRequest(
                    snapshot_id=first.snapshot_id, first_page=FIRST_PAGES, groups=groups
                )
            )

        answer = await describe(b"\1\0\1")
        rows = FIRST_PAGES + np.r_[0:128, 256:300]
        assert answer.digests == digests[rows].tobytes()
        assert answer.fingerprints == fingerprints_of(data[rows]).tobytes()
        await refused(describe(b"\1"), grpc.StatusCode.INVALID_ARGUMENT)
        for stretch in (first, last):
            await host.pages.Taken(
                pages_pb2.TakenRequest(
                    snapshot_id=stretch.snapshot_id, first_page=stretch.first_page
                )
            )
        await refused(describe(b"\1\0\1"), grpc.StatusCode.NOT_FOUND)
        assert await call.read() == grpc.aio.EOF

    async def test_taking_what_is_not_there(self, host: PagesHost) -> None:
        request = pages_pb2.TakenRequest(snapshot_id=bytes(16))
        await refused(host.pages.Taken(request), grpc.StatusCode.NOT_FOUND)
