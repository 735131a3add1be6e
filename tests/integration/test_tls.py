"""Scanner, index and merger over TLS, with certificates that change between restarts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fakes.fake_agent import FakeAgent, random_pages
from helpers.certificates import Authority, settings
from helpers.index_harness import IndexProcess, RedisServer
from helpers.scanner_host import ScannerHost
from helpers.waiting import until

from samepage import errors
from samepage.cli import daemons
from samepage.daemon.roles import Role
from samepage.daemon.server import listen_on
from samepage.daemon.tls import Tls, TlsFiles
from samepage.v1 import scanner_pb2
from samepage_scanner.merging import MergerClient


@contextlib.contextmanager
def operator(monkeypatch: pytest.MonkeyPatch, files: TlsFiles) -> Iterator[None]:
    """The environment of somebody with a certificate."""
    with monkeypatch.context() as patch:
        for name, value in settings(files).items():
            patch.setenv(f"SAMEPAGE_{name.upper()}", str(value))
        yield


async def test_a_cluster_changes_its_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Authority(), Authority()
    index_files = old.role(tmp_path, Role.INDEX)
    scanner_files = old.role(tmp_path, Role.SCANNER)
    redis = RedisServer("valkey", tmp_path)

    def start(listen: str) -> IndexProcess:
        (tmp_path / "ready.json").unlink(missing_ok=True)
        return IndexProcess(
            tmp_path, tmp_path, listen=listen, redis_url=redis.url, **settings(index_files)
        )

    index = start("127.0.0.1:0")
    try:
        address = await index.ready()
        async with contextlib.AsyncExitStack() as stack:
            hosts = [
                await stack.enter_async_context(
                    ScannerHost(node=node, index=address, **settings(scanner_files))
                )
                for node in ("host-a", "host-b")
            ]
            for host in hosts:
                agent = await FakeAgent.connect(host.directory)
                stack.callback(agent.close)
                await agent.open("a", random_pages(30, 1))
                for _ in range(2):
                    await host.service.passes.run_once()
            publishers = [host.service.publisher for host in hosts]
            await until(lambda: [p and p.published for p in publishers] == [30, 30])
            answer = await hosts[0].api.GetOverlap(scanner_pb2.GetOverlapRequest())
            assert [(other.host, other.pages) for other in answer.hosts] == [("host-b", 30)]

            # The index is away while everybody gets new certificates, and comes back with its own.
            index.kill()
            new.role(tmp_path, Role.INDEX)
            new.role(tmp_path, Role.SCANNER)
            await until(lambda: not any(p and p.connected for p in publishers))
            index = start(address)
            await index.ready()
            await until(lambda: all(p and p.connected for p in publishers))
            answer = await hosts[0].api.GetOverlap(scanner_pb2.GetOverlapRequest())
            assert [(other.host, other.pages) for other in answer.hosts] == [("host-b", 30)]

            with operator(monkeypatch, new.role(tmp_path, Role.OPERATOR)):
                stats = await asyncio.to_thread(daemons.index_stats, address)
                assert stats.hosts == 2
            with (
                operator(monkeypatch, new.role(tmp_path, Role.CLIENT)),
                pytest.raises(errors.PermissionDeniedError, match="is for client"),
            ):
                await asyncio.to_thread(daemons.index_stats, address)
            with (
                operator(monkeypatch, old.role(tmp_path / "old", Role.OPERATOR)),
                pytest.raises(errors.ServiceUnavailableError),
            ):
                await asyncio.to_thread(daemons.index_stats, address)
            nowhere = TlsFiles(tmp_path / "none", tmp_path / "none", tmp_path / "none")
            with (
                operator(monkeypatch, nowhere),
                pytest.raises(errors.InvalidArgumentError, match="SAMEPAGE_TLS_CA_FILE"),
            ):
                daemons.index_stats(address)
    finally:
        index.kill()
        redis.kill()


async def test_a_scanner_follows_its_merger_to_new_certificates(tmp_path: Path) -> None:
    old, new = Authority(), Authority()
    merger_files = old.role(tmp_path, Role.MERGER)
    seen: list[bool] = []
    tls = Tls(old.role(tmp_path, Role.SCANNER))

    async def serve(address: str) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        address = listen_on(server, address, Tls(merger_files))
        await server.start()
        return server, address

    server, address = await serve("127.0.0.1:0")
    client = MergerClient(address, 5.0, seen.append, tls)
    watch = asyncio.create_task(client.watch())
    try:
        await until(lambda: seen == [True])
        await server.stop(None)
        await until(lambda: seen == [True, False])
        new.role(tmp_path, Role.MERGER)
        server, _ = await serve(address)
        new.role(tmp_path, Role.SCANNER)
        await until(lambda: seen == [True, False, True])
    finally:
        watch.cancel()
        await client.close()
        await server.stop(None)
