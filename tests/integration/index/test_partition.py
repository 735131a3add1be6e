"""An index and its Redis on two hosts that lose sight of each other."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from helpers import links
from helpers.index_harness import IndexProcess, RedisServer, connected, eventually
from helpers.index_model import DOMAINS, PAGES, Host, agrees, filled

from samepage.cli.netns import Network

pytestmark = [pytest.mark.needs("root", "netns"), pytest.mark.timeout(180)]

PORT = 6379


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path, ["index", "redis"]) as made:
        yield made


@pytest.fixture
def index(network: Network, tmp_path: Path) -> Iterator[IndexProcess]:
    """On a host of its own, as is its Valkey."""
    where = network.address("redis")
    options = ("--port", str(PORT), "--bind", where, "--protected-mode", "no")
    with contextlib.ExitStack() as stack:
        server = RedisServer("valkey", tmp_path, *options, prefix=network.command("redis"))
        stack.callback(server.kill)
        made = IndexProcess(
            tmp_path,
            tmp_path,
            network.command("index"),
            listen=f"{network.address('index')}:0",
            insecure=True,
            redis_url=f"redis://{where}:{PORT}",
            redis_timeout_seconds=0.5,
        )
        stack.callback(made.kill)
        yield made


async def change(host: Host, chosen: random.Random) -> None:
    """Hold other pages, domain by domain."""
    for domain in DOMAINS:
        await host.change(domain, chosen.sample(PAGES, 200), chosen.sample(PAGES, 200))


async def test_the_index_heals_after_every_partition(network: Network, index: IndexProcess) -> None:
    """What could not be told is told afterwards, and nothing else: what Redis has counts still."""
    chosen = random.Random(1)
    async with connected(await index.ready()) as client:
        hosts = await filled(client)
        for _ in range(3):
            with links.apart(network.link("index"), network.link("redis")):
                changing = [asyncio.ensure_future(change(host, chosen)) for host in hosts]
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await client.holders(DOMAINS[0], PAGES[:1])
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

                async def away() -> bool:
                    return not await client.serving()

                await eventually(away)
                assert not any(each.done() for each in changing)
            await asyncio.gather(*changing)
            await eventually(lambda: agrees(client, hosts))
        await eventually(client.serving)
        assert [host.restarts for host in hosts] == [1, 1]
