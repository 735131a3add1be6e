"""Pages between two and more mergers, over data connections and over gRPC: fetching, holding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes.fake_merging_agent import FakeMergingAgent
from helpers.merger_host import DOMAIN
from helpers.pages_host import (
    DOMAIN_ID,
    NO_FINGERPRINTS,
    PagesCluster,
    PagesHost,
    digests_of,
    fingerprints_of,
    pages_cluster,
    random_pages,
    serve,
)

from samepage.daemon.wire import PAGE_SIZE
from samepage.v1 import pages_pb2, pages_pb2_grpc
from samepage_merger.cluster.answering import Answers
from samepage_merger.cluster.away import Bytes
from samepage_merger.cluster.data_server import DataServer
from samepage_merger.cluster.digests import ZERO_DIGEST
from samepage_merger.cluster.fetch import neighbourhood, widen
from samepage_merger.runs import Indices

Pages = np.ndarray[Any, np.dtype[np.uint8]]
Context = grpc.aio.ServicerContext[Any, Any]


@pytest.fixture(params=[True, False], ids=["data", "grpc"])
def data_connections(request: pytest.FixtureRequest) -> bool:
    """Whether there are any; else everything goes over gRPC."""
    return bool(request.param)


@pytest.fixture
async def cluster(tmp_path: Path, data_connections: bool) -> AsyncIterator[PagesCluster]:
    async with pages_cluster(tmp_path, "a", "b", "c", data_connections=data_connections) as cluster:
        yield cluster


class Basket:
    """Takes what is fetched; each page may come once."""

    def __init__(self, pages: int) -> None:
        self.pages: list[bytes | None] = [None] * pages

    async def take(self, numbers: Indices, data: Bytes) -> None:
        assert len(data) == numbers.size * PAGE_SIZE
        for at, number in enumerate(numbers.tolist()):
            assert self.pages[number] is None
            self.pages[number] = bytes(data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, np.ndarray) and self.pages == [row.tobytes() for row in other]


class OddHolder(pages_pb2_grpc.PagesServicer):
    """A holder that is not as it should be: `answer` makes its responses."""

    def __init__(self, pages: Pages) -> None:
        self._pages = {
            digest.tobytes(): page.tobytes()
            for digest, page in zip(digests_of(pages), pages, strict=True)
        }
        self.requests = 0
        self.port = 0
        self.answer: Callable[[pages_pb2.FetchRequest], Awaitable[pages_pb2.FetchResponse]]
        self.answer = self.honest

    async def honest(self, request: pages_pb2.FetchRequest) -> pages_pb2.FetchResponse:
        digests = [request.digests[low : low + 32] for low in range(0, len(request.digests), 32)]
        return pages_pb2.FetchResponse(
            found=bytes(digest in self._pages for digest in digests),
            pages=b"".join(self._pages.get(digest, b"") for digest in digests),
        )

    async def Fetch(
        self, request_iterator: AsyncIterator[pages_pb2.FetchRequest], context: Context
    ) -> AsyncIterator[pages_pb2.FetchResponse]:
        async for request in request_iterator:
            self.requests += 1
            yield await self.answer(request)

    async def Connect(
        self, request: pages_pb2.ConnectRequest, context: Context
    ) -> pages_pb2.ConnectResponse:
        return pages_pb2.ConnectResponse(port=self.port)


class OddAnswers(Answers):
    """What it sends over data connections."""

    def __init__(self, holder: OddHolder) -> None:
        self._holder = holder

    @asynccontextmanager
    async def answer(self, request: pages_pb2.FetchRequest) -> AsyncIterator[Sequence[Bytes]]:
        self._holder.requests += 1
        yield [(await self._holder.answer(request)).SerializeToString()]


@pytest.fixture
async def odd(cluster: PagesCluster, data_connections: bool) -> AsyncIterator[OddHolder]:
    """A fourth host, "odd", that has the pages of random_pages(1000, 1)."""
    holder = OddHolder(random_pages(1000, 1))  # type: ignore[abstract]
    data_server = DataServer(OddAnswers(holder))
    if data_connections:
        holder.port = await data_server.start("127.0.0.1:0")
    server, address = await serve(
        lambda server: pages_pb2_grpc.add_PagesServicer_to_server(holder, server)
    )
    cluster.index.hosts["odd"] = address
    yield holder
    await data_server.close()
    await server.stop(None)


async def fetch(host: PagesHost, pages: Pages, *hints: str, by_fingerprint: bool = False) -> Basket:
    """Fetch all of the pages."""
    basket = Basket(len(pages))
    fingerprints = fingerprints_of(pages) if by_fingerprint else NO_FINGERPRINTS
    missing = await host.fetcher.fetch(
        host.domain, digests_of(pages), fingerprints, hints, basket.take
    )
    assert missing.numbers.tolist() == [n for n, page in enumerate(basket.pages) if page is None]
    return basket


async def test_held_pages_are_fetched(cluster: PagesCluster) -> None:
    pages = random_pages(1000, 1)
    cluster.hosts["b"].keep(pages)
    assert await fetch(cluster.hosts["a"], pages, "b") == pages
    assert cluster.hosts["a"].fetcher.counts.fetched == 1000
    assert cluster.hosts["b"].answers.sent == 1000


async def test_several_holders_are_asked_at_once(cluster: PagesCluster) -> None:
    pages = random_pages(3000, 1)
    for name in "bc":
        cluster.hosts[name].keep(pages)
    assert await fetch(cluster.hosts["a"], pages, "b", "c") == pages
    assert all(cluster.hosts[name].answers.sent for name in "bc")


async def test_one_page(cluster: PagesCluster) -> None:
    pages = random_pages(3, 1)
    cluster.hosts["c"].keep(pages[:2])
    host = cluster.hosts["a"]
    await host.hosts.live()
    digests = [digest.tobytes() for digest in digests_of(pages)]
    for number in (0, 1):
        page = await host.fetcher.page(host.domain, digests[number], ["b", "c"])
        assert page == pages[number].tobytes()
    assert await host.fetcher.page(host.domain, digests[2], ["b", "c"]) is None
    assert await host.fetcher.page(host.domain, digests[0], ["nobody"]) is None


async def test_what_nobody_has_is_gone_and_what_a_silent_host_may_have_is_not(
    cluster: PagesCluster,
) -> None:
    pages = random_pages(4, 1)
    cluster.hosts["b"].keep(pages[:2])
    host = cluster.hosts["a"]
    digests = digests_of(pages)
    missing = await host.fetcher.fetch(host.domain, digests, NO_FINGERPRINTS, [], Basket(4).take)
    assert (missing.numbers.tolist(), missing.gone.tolist()) == ([2, 3], [True, True])
    await cluster.kill("c")
    missing = await host.fetcher.fetch(host.domain, digests, NO_FINGERPRINTS, [], Basket(4).take)
    assert (missing.numbers.tolist(), missing.gone.tolist()) == ([2, 3], [False, False])
    del cluster.index.hosts["c"]
    host.hosts._asked_at = float("-inf")
    missing = await host.fetcher.fetch(host.domain, digests, NO_FINGERPRINTS, [], Basket(4).take)
    assert missing.gone.tolist() == [True, True]


async def test_pages_of_zeros_are_never_sent(cluster: PagesCluster) -> None:
    pages = random_pages(3, 1)
    pages[1] = 0
    cluster.hosts["b"].keep(pages[[0, 2]])
    basket = Basket(3)
    host = cluster.hosts["a"]
    missing = await host.fetcher.fetch(
        host.domain, digests_of(pages), NO_FINGERPRINTS, ["b"], basket.take
    )
    assert not missing.numbers.size
    assert basket.pages == [pages[0].tobytes(), None, pages[2].tobytes()]


async def test_page_of_an_arena_is_found_by_its_fingerprint(cluster: PagesCluster) -> None:
    holder = cluster.hosts["b"]
    agent = FakeMergingAgent(holder.path)
    await agent.connect()
    pages = random_pages(700, 1)
    arena = await agent.open("arena", pages)
    holder.locate(agent, arena)
    arena.data[5] ^= 1
    cluster.index.held["b"] = {row.tobytes() for row in fingerprints_of(pages)}
    basket = await fetch(cluster.hosts["a"], pages, by_fingerprint=True)
    assert basket.pages[5] is None
    assert basket.pages[:5] == [row.tobytes() for row in pages[:5]]
    assert basket.pages[6:] == [row.tobytes() for row in pages[6:]]
    assert not cluster.hosts["a"].hosts.known(["b"])[0].lies
    holder.assert_exact(agent)
    await agent.die()


async def test_liar_is_counted_and_avoided(cluster: PagesCluster, odd: OddHolder) -> None:
    pages = random_pages(1000, 1)
    cluster.hosts["b"].keep(pages)
    sent = asyncio.Event()

    async def lie(request: pages_pb2.FetchRequest) -> pages_pb2.FetchResponse:
        response = await odd.honest(request)
        wrong = bytearray(response.pages)
        wrong[100] ^= 1
        sent.set()
        return pages_pb2.FetchResponse(found=response.found, pages=bytes(wrong))

    odd.answer = lie
    host = cluster.hosts["a"]
    assert await fetch(host, pages, "odd") == pages
    assert sent.is_set()
    (liar,) = host.hosts.known(["odd"])
    assert liar.avoided and liar.lies == host.fetcher.counts.wrong > 0
    asked = odd.requests
    assert await fetch(host, pages, "odd", "b") == pages
    assert odd.requests == asked


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE - 1, 3 * PAGE_SIZE])
async def test_answer_of_the_wrong_length(cluster: PagesCluster, odd: OddHolder, size: int) -> None:
    async def answer(request: pages_pb2.FetchRequest) -> pages_pb2.FetchResponse:
        return pages_pb2.FetchResponse(
            found=b"\1" * (len(request.digests) // 32), pages=bytes(size)
        )

    odd.answer = answer
    pages = random_pages(2, 1)
    cluster.hosts["b"].keep(pages)
    assert await fetch(cluster.hosts["a"], pages, "odd") == pages
    assert cluster.hosts["a"].hosts.known(["odd"])[0].avoided


async def test_slow_holder_is_left_behind(cluster: PagesCluster, odd: OddHolder) -> None:
    pages = random_pages(1000, 1)
    cluster.hosts["b"].keep(pages)
    never = asyncio.Event()

    async def answer(request: pages_pb2.FetchRequest) -> pages_pb2.FetchResponse:
        await never.wait()
        return await odd.honest(request)

    odd.answer = answer
    assert await fetch(cluster.hosts["a"], pages, "odd", "b") == pages
    assert odd.requests > 0
    assert cluster.hosts["a"].fetcher.counts.slow > 0
    never.set()


async def test_holder_that_dies_in_the_middle(cluster: PagesCluster, odd: OddHolder) -> None:
    pages = random_pages(1000, 1)
    cluster.hosts["b"].keep(pages)

    async def answer(request: pages_pb2.FetchRequest) -> pages_pb2.FetchResponse:
        if odd.requests > 2:
            raise ConnectionError
        return await odd.honest(request)

    odd.answer = answer
    assert await fetch(cluster.hosts["a"], pages, "odd") == pages


async def test_cancelled_calls_never_mix_up_replies(cluster: PagesCluster) -> None:
    """Each page that comes is the one that was asked for: digests are checked, so a mixed-up reply
    would show as a lie, or as a missing page."""
    pages = random_pages(200, 1)
    cluster.hosts["b"].keep(pages)
    host = cluster.hosts["a"]
    await host.hosts.live()
    digests = [digest.tobytes() for digest in digests_of(pages)]
    rng = np.random.default_rng(7)
    for _ in range(30):
        numbers = rng.integers(0, len(pages), 8).tolist()
        calls = [
            asyncio.ensure_future(host.fetcher.page(host.domain, digests[number], ["b"]))
            for number in numbers
        ]
        await asyncio.sleep(float(rng.random()) * 0.004)
        cancelled = rng.random(8) < 0.5
        for call, gone in zip(calls, cancelled, strict=True):
            if gone:
                call.cancel()
        for number, call, gone in zip(numbers, calls, cancelled, strict=True):
            try:
                assert await call == pages[number].tobytes()
            except asyncio.CancelledError:
                assert gone
    (holder,) = host.hosts.known(["b"])
    assert not holder.lies


async def test_taker_that_fails_ends_the_fetch(cluster: PagesCluster) -> None:
    pages = random_pages(1000, 1)
    cluster.hosts["b"].keep(pages)
    host = cluster.hosts["a"]

    async def take(numbers: Indices, data: Bytes) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        await host.fetcher.fetch(host.domain, digests_of(pages), NO_FINGERPRINTS, ["b"], take)


async def test_unknown_domain_has_nothing(cluster: PagesCluster) -> None:
    digests = digests_of(random_pages(2, 1)).tobytes()
    host = cluster.hosts["b"]
    stream = host.pages.Fetch()
    for count in (1, 2):
        await stream.write(
            pages_pb2.FetchRequest(domain_id=b"?" * 16, digests=digests[: 32 * count])
        )
        response = await stream.read()
        assert response == pages_pb2.FetchResponse(found=bytes(count))
    stream.cancel()
    held = await host.pages.Hold(
        pages_pb2.HoldRequest(domain_id=b"?" * 16, owner="a", digests=digests, lease_ms=1000)
    )
    assert held.held == bytes(2)


@pytest.mark.parametrize(
    ("domain_id", "fingerprints", "digests"),
    [
        (bytes(15), b"", bytes(32)),
        (bytes(16), b"", b""),
        (bytes(16), b"", bytes(33)),
        (bytes(16), bytes(16), bytes(64)),
        (bytes(16), b"", bytes(32 * 4097)),
    ],
)
async def test_wrong_lengths(
    cluster: PagesCluster, domain_id: bytes, fingerprints: bytes, digests: bytes
) -> None:
    host = cluster.hosts["a"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await host.pages.Hold(
            pages_pb2.HoldRequest(
                domain_id=domain_id,
                owner="b",
                fingerprints=fingerprints,
                digests=digests,
                lease_ms=1000,
            )
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stream = host.pages.Fetch()
    await stream.write(
        pages_pb2.FetchRequest(domain_id=domain_id, fingerprints=fingerprints, digests=digests)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("owner", "lease_ms"), [("", 1000), ("a/b", 1000), ("a", 0)])
async def test_hold_without_an_owner_or_a_lease(
    cluster: PagesCluster, owner: str, lease_ms: int
) -> None:
    request = pages_pb2.HoldRequest(
        domain_id=DOMAIN_ID, owner=owner, digests=bytes(32), lease_ms=lease_ms
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.hosts["a"].pages.Hold(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def hold(host: PagesHost, pages: Pages, owner: str = "a", store_id: bytes = b"") -> list[int]:
    response = await host.pages.Hold(
        pages_pb2.HoldRequest(
            domain_id=DOMAIN_ID,
            owner=owner,
            fingerprints=fingerprints_of(pages).tobytes(),
            digests=digests_of(pages).tobytes(),
            lease_ms=60_000,
            store_id=store_id,
        )
    )
    return list(response.held)


async def test_two_owners_of_one_name_hold_apart(cluster: PagesCluster) -> None:
    """What one of them releases, the other still has."""
    host = cluster.hosts["b"]
    pages = random_pages(20, 1)
    host.keep(pages, owner="c")
    for store_id in (b"1" * 16, b"2" * 16):
        assert all(await hold(host, pages, "a", store_id))
    digests = digests_of(pages).tobytes()
    for owner, store_id in (("a", b"1" * 16), ("c", b"")):
        await host.pages.Release(
            pages_pb2.ReleaseRequest(
                domain_id=DOMAIN_ID, owner=owner, digests=digests, store_id=store_id
            )
        )
    assert await fetch(cluster.hosts["a"], pages, "b") == pages
    for store_id, holds in ((b"1" * 16, 0), (b"2" * 16, 20)):
        request = pages_pb2.RenewRequest(owner="a", lease_ms=60_000, store_id=store_id)
        assert (await host.pages.Renew(request)).holds == holds
    # And only the owner itself says what may go.
    asked = pages_pb2.LetGoRequest(
        domain_id=DOMAIN_ID, holder="a", digests=digests, store_id=b"1" * 16
    )
    assert not any((await host.pages.LetGo(asked)).agreed)


async def test_pages_of_arenas_are_held_without_more_memory(cluster: PagesCluster) -> None:
    """A private page becomes a slot that its arena maps; the hold outlives the arena's page."""
    host = cluster.hosts["b"]
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    pages = random_pages(600, 1)
    arena = await agent.open("arena", pages)
    host.locate(agent, arena)
    agent.write(arena, 7, b"other bytes")
    arena.pinned[9] = True
    expected = [number not in (7, 9) for number in range(600)]
    assert await hold(host, pages) == expected
    assert host.domain.store.resident_bytes() == 598 * PAGE_SIZE
    assert int(np.count_nonzero(arena.slots)) == 598
    assert await hold(host, pages, "c") == expected
    assert host.domain.store.resident_bytes() == 598 * PAGE_SIZE
    await agent.close_arena(arena)
    assert await fetch(cluster.hosts["a"], pages[10:], "b") == pages[10:]
    for owner in "ac":
        await host.pages.Release(
            pages_pb2.ReleaseRequest(
                domain_id=DOMAIN_ID, owner=owner, digests=digests_of(pages).tobytes()
            )
        )
    assert host.domain.store.resident_bytes() == 0
    await agent.die()


async def test_page_of_zeros_is_held_by_everybody(cluster: PagesCluster) -> None:
    response = await cluster.hosts["b"].pages.Hold(
        pages_pb2.HoldRequest(domain_id=DOMAIN_ID, owner="a", digests=ZERO_DIGEST, lease_ms=1)
    )
    assert response.held == b"\1"


async def test_renewing_tells_how_much_is_held(cluster: PagesCluster) -> None:
    host = cluster.hosts["b"]
    host.keep(random_pages(30, 1), owner="a")
    host.keep(random_pages(5, 2), owner="c")
    answer = await host.pages.Renew(pages_pb2.RenewRequest(owner="a", lease_ms=120_000))
    assert answer.holds == 30
    nobody = await host.pages.Renew(pages_pb2.RenewRequest(owner="nobody", lease_ms=1000))
    assert nobody.holds == 0


async def test_killed_merger_keeps_holds(cluster: PagesCluster) -> None:
    pages = random_pages(300, 1)
    host = cluster.hosts["b"]
    agent = FakeMergingAgent(host.path)
    await agent.connect()
    arena = await agent.open("arena", random_pages(20, 2))
    other = await agent.open("other", random_pages(20, 2))
    await host.merge_all(arena, other)
    host.keep(pages, owner="a")
    await agent.die()
    await cluster.kill("b")
    host = await cluster.add("b")
    await host.settled()
    assert host.domain.store.resident_bytes() == 300 * PAGE_SIZE
    assert await fetch(cluster.hosts["a"], pages, "b") == pages
    answer = await host.pages.Renew(pages_pb2.RenewRequest(owner="a", lease_ms=1000))
    assert answer.holds == 300
    assert host.domains.find(DOMAIN_ID) is host.domain
    assert host.domain.name == DOMAIN


def test_hit_in_a_sampled_index_stands_for_its_neighbourhood() -> None:
    fingerprints = np.random.default_rng(1).integers(1, 256, (1000, 16), np.uint8)
    fingerprints[:, 15] |= 1
    fingerprints[::64, 15] = 16
    hits = np.zeros(1000, np.bool_)
    hits[64] = hits[640] = True
    assert neighbourhood(fingerprints, [hits]) == 32
    assert np.flatnonzero(widen(hits, 32)).tolist() == [*range(32, 97), *range(608, 673)]
    everything = np.ones(1000, np.bool_)
    assert neighbourhood(fingerprints, [everything]) == 0
