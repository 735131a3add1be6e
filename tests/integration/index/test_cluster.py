"""The index on a Redis Cluster: what a flush or a failover loses heals, and is not believed."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from helpers.index_harness import Client, Stream, connected, eventually
from helpers.redis_cluster import RedisCluster
from redis.crc import key_slot

from .conftest import StartIndex

pytestmark = pytest.mark.needs("redis")

DOMAINS = (b"d" * 16, b"o" * 16)
HOSTS = ("alpha", "beta")


def fingerprint(number: int) -> bytes:
    """One of its own for each number."""
    return random.Random(number).randbytes(16)


PAGES = [fingerprint(number) for number in range(2000)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    made = RedisCluster(tmp_path)
    yield made
    made.kill()


class Host:
    """A scanner as the index sees it: it remembers what it holds, and tells the index until that
    knows everything."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        self.restarts = 0
        self._client = client
        self._stream: Stream | None = None
        self._pages: dict[bytes, set[bytes]] = {domain: set() for domain in DOMAINS}

    def holds(self, domain: bytes) -> set[bytes]:
        return self._pages[domain]

    async def change(self, domain: bytes, added: list[bytes], removed: list[bytes]) -> None:
        """Hold other pages from now on, and tell."""
        self._pages[domain] -= set(removed)
        self._pages[domain] |= set(added)
        await self._until_told(domain, added, removed)

    async def keep(self) -> None:
        """Renew the lease; tell everything if the index knows nothing."""
        try:
            if self._stream is not None and await self._stream.renew():
                return
        except grpc.aio.AioRpcError:
            self._stream = None
        await self._until_told(DOMAINS[0], [], [])

    async def _until_told(self, domain: bytes, added: list[bytes], removed: list[bytes]) -> None:
        while True:
            try:
                if self._stream is None:
                    self._stream = self._client.stream()
                    if not await self._stream.announce(self.name):
                        await self._tell_all(self._stream)
                await self._stream.publish(domain, added, removed)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
                self._stream = None
                # what a scanner's back-off is for: the cluster is electing a primary
                await asyncio.sleep(0.05)
            else:
                return

    async def _tell_all(self, stream: Stream) -> None:
        self.restarts += 1
        for domain, pages in self._pages.items():
            await stream.publish(domain, sorted(pages))


async def agrees(client: Client, hosts: list[Host]) -> bool:
    """Whether the index says what a plain comparison says."""
    for host in hosts:
        await host.keep()
    for domain in DOMAINS:
        held = {page: {host.name for host in hosts if page in host.holds(domain)} for page in PAGES}
        try:
            found = await client.holders(domain, PAGES)
        except grpc.aio.AioRpcError:
            return False
        if found != {page: names for page, names in held.items() if names}:
            return False
    return True


async def filled(client: Client) -> list[Host]:
    hosts = [Host(name, client) for name in HOSTS]
    for number, host in enumerate(hosts):
        for domain in DOMAINS:
            await host.change(domain, PAGES[number * 500 : 1500], [])
    assert await agrees(client, hosts)
    return hosts


async def test_a_cluster_serves_and_says_so(start_index: StartIndex, cluster: RedisCluster) -> None:
    async with connected(await start_index(redis_url=cluster.url).ready()) as client:
        await filled(client)
        stats = await client.stats()
        assert stats.entries == 2 * (1500 + 1000)
        assert stats.fingerprints == 2 * 1500
        assert stats.store.endswith("a cluster of 3 primaries")
        for node in cluster.primaries():
            assert len(node.ask("KEYS", "samepage:*")) > 10, "shards are spread"


async def test_two_indexes_on_one_cluster(start_index: StartIndex, cluster: RedisCluster) -> None:
    addresses = [await start_index(redis_url=cluster.url).ready() for _ in range(2)]
    async with connected(addresses[0]) as one, connected(addresses[1]) as other:
        hosts = [Host("alpha", one), Host("beta", other)]
        await asyncio.gather(
            *(host.change(DOMAINS[0], PAGES[at : at + 1200], []) for at, host in enumerate(hosts))
        )
        assert await agrees(one, hosts)
        assert await agrees(other, hosts)


@pytest.mark.parametrize("holds_hosts", [True, False])
async def test_one_primary_flushed_in_mid_stream(
    start_index: StartIndex, cluster: RedisCluster, holds_hosts: bool
) -> None:
    """Also one that holds nothing but entries, so that no host misses itself."""
    slot = key_slot(b"samepage:{hosts}")
    nodes = cluster.primaries()
    flushed = nodes[slot * 3 // 16384 if holds_hosts else (slot * 3 // 16384 + 1) % 3]
    async with connected(await start_index(redis_url=cluster.url).ready()) as client:
        hosts = await filled(client)
        before = [host.restarts for host in hosts]
        flushed.ask("FLUSHALL", "SYNC")
        await hosts[0].change(DOMAINS[1], PAGES[1500:], PAGES[:100])

        async def healed() -> bool:
            return await agrees(client, hosts)

        await eventually(healed)
        assert [host.restarts for host in hosts] != before


async def test_failover_in_mid_stream(start_index: StartIndex, cluster: RedisCluster) -> None:
    async with connected(await start_index(redis_url=cluster.url).ready()) as client:
        hosts = await filled(client)
        victim = cluster.primaries()[1]
        victim.kill()
        await hosts[0].change(DOMAINS[0], PAGES[1500:1800], PAGES[:300])
        await hosts[1].change(DOMAINS[1], PAGES[:10], PAGES[1000:1200])

        async def healed() -> bool:
            return await agrees(client, hosts)

        await eventually(healed)
        victim.start()
        cluster.settle()
        await hosts[0].change(DOMAINS[0], PAGES[:20], [])
        await eventually(healed)


async def test_the_documented_rights_are_enough(start_index: StartIndex, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "index.md").read_text()
    rights = [
        found.replace("PASSWORD", "secret").split()
        for found in re.findall(r"^ACL SETUSER index (.*)$", text, re.MULTILINE)
    ]
    cluster = RedisCluster(tmp_path, "--user", "index", *rights[0], *rights[1])
    try:
        url = cluster.url.replace("//", "//index:secret@")
        process = start_index(redis_url=url, lease_seconds=0.3)
        async with connected(await process.ready()) as client:
            await filled(client)
        assert "does not permit" not in process.log
    finally:
        cluster.kill()
