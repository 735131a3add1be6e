"""Scanners and the real index, over its own Valkey."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from fakes.fake_agent import FakeAgent, random_pages
from helpers.scanner_host import ScannerHost
from helpers.waiting import until

from samepage.v1 import index_pb2, index_pb2_grpc, scanner_pb2
from samepage_index.config import IndexConfig
from samepage_index.service import IndexService


@dataclass
class Cluster:
    """Two hosts and an index."""

    index: index_pb2_grpc.IndexAsyncStub
    hosts: list[ScannerHost]
    agents: list[FakeAgent]

    async def scan(self) -> None:
        for host in self.hosts:
            for _ in range(2):
                await host.service.passes.run_once()

    async def overlap(self, host: int) -> tuple[dict[str, int], int]:
        request = scanner_pb2.GetOverlapRequest()
        answer = await self.hosts[host].api.GetOverlap(request)
        return {other.host: other.pages for other in answer.hosts}, answer.distinct_pages

    async def published(self, *counts: int) -> None:
        """Wait until each host has told the index of so many fingerprints."""
        await until(lambda: [published(host) for host in self.hosts] == list(counts))

    async def entries(self) -> int:
        stats = await self.index.GetIndexStats(index_pb2.GetIndexStatsRequest())
        return stats.entries


def published(host: ScannerHost) -> int:
    assert host.service.publisher is not None
    return host.service.publisher.published


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with contextlib.AsyncExitStack() as stack:
        service = IndexService(IndexConfig())
        server = grpc.aio.server()
        service.register(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        stack.push_async_callback(service.close)
        await service.start()
        await server.start()
        stack.push_async_callback(server.stop, None)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        hosts = [
            await stack.enter_async_context(ScannerHost(node=node, index=address))
            for node in ("host-a", "host-b")
        ]
        agents = [await FakeAgent.connect(host.directory) for host in hosts]
        for agent in agents:
            stack.callback(agent.close)
        yield Cluster(index_pb2_grpc.IndexStub(channel), hosts, agents)


async def test_a_host_that_serves_is_in_the_index(cluster: Cluster) -> None:
    answer = await cluster.index.ListHosts(index_pb2.ListHostsRequest())
    assert {host.name for host in answer.hosts} == {"host-a", "host-b"}


async def test_an_index_that_does_not_answer_keeps_no_host_from_serving() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "{}:{}".format(*silent.getsockname())
        async with ScannerHost(node="host-a", index=address) as host:
            status = await host.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
    assert not status.index_connected


async def test_hosts_learn_what_they_have_in_common(cluster: Cluster) -> None:
    first = await cluster.agents[0].open("a", random_pages(50, 1))
    common = np.concatenate((random_pages(50, 1)[10:40], random_pages(20, 2)))
    second = await cluster.agents[1].open("a", common)
    await cluster.scan()
    await cluster.published(50, 50)
    assert await cluster.overlap(0) == ({"host-b": 30}, 50)
    assert await cluster.overlap(1) == ({"host-a": 30}, 50)
    assert await cluster.entries() == 100
    second.memory[:10] = random_pages(1, 3)[0]
    first.memory[30:] = first.memory[0]
    await cluster.scan()
    await cluster.published(30, 41)
    assert await cluster.overlap(0) == ({"host-b": 10}, 30)
    assert await cluster.entries() == 71


async def test_equal_pages_of_two_domains_are_no_overlap(cluster: Cluster) -> None:
    await cluster.agents[0].open("a", random_pages(10, 1), "one")
    await cluster.agents[1].open("a", random_pages(10, 1), "two")
    await cluster.scan()
    await cluster.published(10, 10)
    assert await cluster.overlap(0) == ({}, 10)


async def test_two_hosts_with_one_name(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second says so, and goes on alone until the first has gone in order."""
    monkeypatch.setattr("samepage_scanner.publisher._REFUSED_SECONDS", 0.05)
    await cluster.agents[0].open("a", random_pages(10, 1))
    await cluster.scan()
    await cluster.published(10, 0)
    address = cluster.hosts[0].config.index
    async with ScannerHost(node="host-a", index=address, merger_address="other:1") as twin:
        agent = await FakeAgent.connect(twin.directory)
        await agent.open("b", random_pages(20, 2))
        publisher = twin.service.publisher
        assert publisher is not None
        await until(lambda: publisher.refusal != "")
        status = await twin.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
        assert "another host is in the cluster as 'host-a'" in status.index_refusal
        assert not status.index_connected
        for _ in range(2):
            await twin.service.passes.run_once()
        await cluster.published(10, 0)
        assert await cluster.entries() == 10
        assert cluster.hosts[0].service.publisher is not None
        assert not cluster.hosts[0].service.publisher.refusal
        await cluster.hosts[0].service.drain()
        await until(lambda: publisher.published == 20)
        assert not publisher.refusal
        agent.close()


async def test_many_pages_in_many_batches(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samepage_scanner.publisher.BATCH_MAX", 300)
    monkeypatch.setattr("samepage_scanner.publisher.LOOKUP_MAX", 700)
    for agent in cluster.agents:
        await agent.open("a", random_pages(2000, 1))
    await cluster.scan()
    await cluster.published(2000, 2000)
    assert await cluster.overlap(1) == ({"host-a": 2000}, 2000)
    cluster.agents[0].close_arena(cluster.agents[0].arenas[1])
    await cluster.agents[0].open("b", random_pages(10, 1))
    await cluster.scan()
    await cluster.published(10, 2000)
    assert await cluster.overlap(1) == ({"host-a": 10}, 2000)
