"""On which way pages are fetched, and what becomes of data connections that do not keep to it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from helpers.pages_host import (
    DOMAIN_ID,
    PagesCluster,
    PagesHost,
    digests_of,
    pages_cluster,
    random_pages,
)

from samepage.daemon.server import ListenError
from samepage.v1 import pages_pb2
from samepage_merger.cluster import streams
from samepage_merger.cluster.answering import FETCH_MAX
from samepage_merger.cluster.streams import DataStream, FetchStream, GrpcStream

PAGES = random_pages(20, 1)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[PagesCluster]:
    async with pages_cluster(tmp_path, "a", "b") as cluster:
        cluster.hosts["b"].keep(PAGES)
        await cluster.hosts["a"].hosts.live()
        yield cluster


async def fetch_one(host: PagesHost, number: int = 0) -> None:
    """Have one page fetched from "b"."""
    digest = digests_of(PAGES)[number].tobytes()
    assert await host.fetcher.page(host.domain, digest, ["b"]) == PAGES[number].tobytes()


def ways(host: PagesHost) -> list[FetchStream]:
    """The streams to "b" that are kept."""
    (other,) = host.hosts.known(["b"])
    return [stream for _, stream in other._idle]


async def test_data_connections_are_kept_and_used_again(cluster: PagesCluster) -> None:
    await fetch_one(cluster.hosts["a"])
    (first,) = ways(cluster.hosts["a"])
    assert isinstance(first, DataStream)
    await fetch_one(cluster.hosts["a"], 1)
    assert ways(cluster.hosts["a"]) == [first]


async def test_one_that_was_closed_meanwhile_is_made_anew(cluster: PagesCluster) -> None:
    await fetch_one(cluster.hosts["a"])
    (first,) = ways(cluster.hosts["a"])
    await cluster.hosts["b"].data_server.close()
    cluster.hosts["b"].servicer.data_port = await cluster.hosts["b"].data_server.start(
        "127.0.0.1:0"
    )
    await fetch_one(cluster.hosts["a"], 1)
    (second,) = ways(cluster.hosts["a"])
    assert isinstance(second, DataStream) and second is not first


async def test_a_host_that_takes_none_is_asked_over_grpc(cluster: PagesCluster) -> None:
    cluster.hosts["b"].servicer.data_port = 0
    await fetch_one(cluster.hosts["a"])
    (way,) = ways(cluster.hosts["a"])
    assert isinstance(way, GrpcStream)
    assert not cluster.hosts["a"].hosts.known(["b"])[0].unreachable


async def test_a_port_that_nobody_lets_through_is_told_and_pages_come_over_grpc(
    cluster: PagesCluster,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    cluster.hosts["b"].servicer.data_port = port
    await fetch_one(cluster.hosts["a"])
    (way,) = ways(cluster.hosts["a"])
    assert isinstance(way, GrpcStream)
    (other,) = cluster.hosts["a"].hosts.known(["b"])
    assert other.unreachable and not other.avoided


async def test_data_connections_are_tried_again_after_a_while(
    cluster: PagesCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_REST_SECONDS", 0.0)
    port = cluster.hosts["b"].servicer.data_port
    cluster.hosts["b"].servicer.data_port = 0
    await fetch_one(cluster.hosts["a"])
    (way,) = ways(cluster.hosts["a"])
    assert isinstance(way, GrpcStream)
    cluster.hosts["b"].servicer.data_port = port
    await fetch_one(cluster.hosts["a"])
    (way,) = ways(cluster.hosts["a"])
    assert isinstance(way, DataStream)


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("<I", 0),
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 4) + b"\xff\xff\xff\xff",
        struct.pack("<I", 2) + b"\x0a\x00",
    ],
    ids=["empty", "huge", "no protobuf", "no digests"],
)
async def test_who_makes_no_sense_is_hung_up_on_and_others_are_served(
    cluster: PagesCluster, sent: bytes
) -> None:
    port = cluster.hosts["b"].servicer.data_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    assert await reader.read() == b""
    writer.close()
    await fetch_one(cluster.hosts["a"])
    assert isinstance(ways(cluster.hosts["a"])[0], DataStream)


async def test_no_more_pages_than_a_request_may_name(cluster: PagesCluster) -> None:
    port = cluster.hosts["b"].servicer.data_port
    for count in (FETCH_MAX, FETCH_MAX + 1):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        digests = np.random.default_rng(1).bytes(32 * count)
        request = pages_pb2.FetchRequest(domain_id=DOMAIN_ID, digests=digests).SerializeToString()
        writer.write(struct.pack("<I", len(request)) + request)
        head = await reader.read(4)
        assert bool(head) == (count == FETCH_MAX)
        writer.close()


async def test_an_address_that_cannot_be_served_on(cluster: PagesCluster) -> None:
    port = cluster.hosts["b"].servicer.data_port
    with pytest.raises(ListenError, match="set data_listen to another"):
        await cluster.hosts["a"].data_server.start(f"127.0.0.1:{port}")
