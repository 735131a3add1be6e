"""The index on a Redis Cluster: what a flush or a failover loses heals, and is not believed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.index_harness import connected, eventually
from helpers.index_model import DOMAINS, PAGES, Host, agrees, filled
from helpers.redis_cluster import RedisCluster
from redis.crc import key_slot

from .conftest import StartIndex

pytestmark = pytest.mark.needs("redis")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    made = RedisCluster(tmp_path)
    yield made
    made.kill()


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
