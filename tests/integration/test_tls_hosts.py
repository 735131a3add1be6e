"""Two real hosts whose daemons speak TLS: pages cross, and only mergers get any."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from application import Application
from helpers.certificates import Authority, settings
from helpers.up import Up, running

from samepage.cli import daemons
from samepage.daemon.roles import Role
from samepage.daemon.tls import Tls, open_channel
from samepage.v1 import pages_pb2, pages_pb2_grpc
from samepage_merger.cluster.connection import Connection
from samepage_merger.cluster.fetched import Fetched, parse

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap", "poison")

PAGES = 300
SERVICES = {
    "MERGER": Role.MERGER,
    "SCANNER": Role.SCANNER,
    "INDEX": Role.INDEX,
    "ARENAS": Role.ARENAS,
}


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def cluster(authority: Authority, folder: Path) -> Iterator[Up]:
    with pytest.MonkeyPatch.context() as patch:
        for service, role in SERVICES.items():
            for name, value in settings(authority.role(folder, role)).items():
                patch.setenv(f"SAMEPAGE_{service}_{name.upper()}", str(value))
        with running(folder / "up", 2) as up:
            yield up


def test_an_arena_is_cloned(cluster: Up) -> None:
    with Application(cluster.host(1)) as one, Application(cluster.host(2)) as two:
        one.call("create", "a", PAGES)
        one.call("fill", "a", 1)
        two.call("clone", "clone_arena", "host-1/a", "b")
        assert two.call("digest", "b") == one.call("digest", "a")


@pytest.mark.parametrize("role", [Role.SCANNER, Role.INDEX, Role.ARENAS, Role.OPERATOR])
async def test_nobody_but_a_merger_gets_pages(
    cluster: Up, authority: Authority, folder: Path, role: Role
) -> None:
    tls = Tls(authority.role(folder / "callers", role))
    address = cluster.cluster.hosts[0].merger
    async with open_channel(address, Role.MERGER, tls) as channel:
        stub = pages_pb2_grpc.PagesStub(channel)
        # A message on a stream that is refused may come too late, which is another error.
        calls: list[Any] = [
            stub.Fetch(),
            stub.Snapshot(pages_pb2.SnapshotRequest()),
            stub.Freeze(pages_pb2.FreezeRequest()),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Leave(pages_pb2.LeaveRequest())
        assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_merger_is_let_in(cluster: Up, authority: Authority, folder: Path) -> None:
    tls = Tls(authority.role(folder / "callers", Role.MERGER))
    request = pages_pb2.FetchRequest(domain_id=bytes(16), digests=bytes(32))
    async with open_channel(cluster.cluster.hosts[0].merger, Role.MERGER, tls) as channel:
        answer = await pages_pb2_grpc.PagesStub(channel).Fetch(iter([request])).read()
        assert isinstance(answer, pages_pb2.FetchResponse)
        assert (answer.found, answer.pages) == (b"\0", b"")


async def test_data_connections_are_for_mergers_alone(
    cluster: Up, authority: Authority, folder: Path
) -> None:
    address = cluster.cluster.hosts[0].merger
    merger = Tls(authority.role(folder / "callers", Role.MERGER))
    async with open_channel(address, Role.MERGER, merger) as channel:
        stub = pages_pb2_grpc.PagesStub(channel)
        port = (await stub.Connect(pages_pb2.ConnectRequest())).port
    request = pages_pb2.FetchRequest(domain_id=bytes(16), digests=bytes(32))
    for role in (Role.MERGER, Role.SCANNER, Role.OPERATOR):
        tls = Tls(authority.role(folder / "callers", role))
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(1 << 20),
            address.rpartition(":")[0],
            port,
            ssl=tls.client_context(),
            server_hostname=Role.MERGER.dns_name,
        )
        with contextlib.nullcontext() if role is Role.MERGER else pytest.raises(ConnectionError):
            await connection.send([request.SerializeToString()])
            assert parse(await connection.receive()) == Fetched(b"\0", memoryview(b""))
        connection.close()


def test_operators_on_a_host_need_no_certificate(cluster: Up) -> None:
    """Over unix sockets nothing changes."""
    host = cluster.cluster.hosts[0]
    assert daemons.host_status(host).errors == ()
