"""No reply ever reaches another call than its own, also when calls are cancelled at any moment."""

from __future__ import annotations

import asyncio
import random

import grpc
from helpers.index_harness import Books, connected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samepage.v1 import index_pb2 as pb

from .conftest import Server, StartIndex

DOMAINS = (b"d" * 16, b"o" * 16)
CALLS = 60


def fingerprint(number: int) -> bytes:
    """The same for both domains, which have other holders."""
    return random.Random(number).randbytes(16)


PAGES = [fingerprint(number) for number in range(200)]
# Who holds a page, by domain: so that an answer meant for another call shows.
HOLDERS = {
    domain: {page: f"{name}-{number % 7}" for number, page in enumerate(PAGES)}
    for domain, name in zip(DOMAINS, ("dora", "olga"), strict=True)
}


async def fill(books: Books) -> None:
    for domain, holders in HOLDERS.items():
        for host in sorted(set(holders.values())):
            publisher = books.index.publisher()
            await publisher.announce(host, 1, "")
            added = b"".join(page for page in PAGES if holders[page] == host)
            await publisher.publish(domain, added, b"")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_cancelled_in_the_index(server: Server, seed: int) -> None:
    """Against the index's own logic: its connections to Redis are what could be mixed up."""
    draw = random.Random(seed)

    async def look_up(books: Books, domain: bytes, pages: list[bytes]) -> None:
        found = await books.holders(domain, pages)
        assert found == {page: {HOLDERS[domain][page]} for page in pages}

    async def run() -> int:
        answered = 0
        server.flush()
        async with Books(server.url) as books:
            await fill(books)
            calls = []
            for _ in range(CALLS):
                pages = draw.sample(PAGES, draw.randint(1, 50))
                calls.append(asyncio.ensure_future(look_up(books, draw.choice(DOMAINS), pages)))
                if draw.random() < 0.5:
                    asyncio.get_running_loop().call_later(
                        draw.random() * 0.02, draw.choice(calls).cancel
                    )
                if draw.random() < 0.3:
                    await asyncio.sleep(draw.random() * 0.002)
            for result in await asyncio.gather(*calls, return_exceptions=True):
                if not isinstance(result, asyncio.CancelledError):
                    assert result is None, result
                    answered += 1
            await look_up(books, DOMAINS[0], PAGES)
            await look_up(books, DOMAINS[1], PAGES)
        return answered

    assert asyncio.run(run()) > 0


async def test_cancelled_by_clients(server: Server, start_index: StartIndex) -> None:
    """The same through gRPC, with deadlines that end calls in the middle."""
    draw = random.Random(1)
    server.flush()
    async with Books(server.url) as books:
        await fill(books)
        async with connected(await start_index(redis_url=server.url).ready()) as client:

            async def look_up(domain: bytes, pages: list[bytes], seconds: float) -> bool:
                request = pb.LookupRequest(domain_id=domain, fingerprints=b"".join(pages))
                try:
                    found = await client.stub.Lookup(request, timeout=seconds)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    return False
                words = memoryview(found.holders).cast("I")
                held = {
                    pages[at]: found.hosts[host].name
                    for at, host in zip(words[::2], words[1::2], strict=True)
                }
                assert held == {page: HOLDERS[domain][page] for page in pages}
                return True

            answered = 0
            for _ in range(20):
                calls = [
                    look_up(
                        draw.choice(DOMAINS),
                        draw.sample(PAGES, draw.randint(1, 50)),
                        draw.choice((0.001, 0.003, 0.01, 10.0)),
                    )
                    for _ in range(30)
                ]
                answered += sum(await asyncio.gather(*calls))
            assert 0 < answered < 600, "some were cancelled, some were not"
