"""The scanner's API, health and command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes.fake_agent import FakeAgent, random_pages
from fakes.fake_merger import FakeMerger
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.scanner_host import ScannerHost
from helpers.waiting import until

from samepage.v1 import scanner_pb2, scanner_pb2_grpc
from samepage_scanner.locate import PLACE


@pytest.fixture
async def host() -> AsyncIterator[ScannerHost]:
    async with ScannerHost() as host:
        yield host


@pytest.fixture
async def agent(host: ScannerHost) -> AsyncIterator[FakeAgent]:
    agent = await FakeAgent.connect(host.directory)
    yield agent
    agent.close()


@pytest.fixture
async def merger(host: ScannerHost, agent: FakeAgent) -> AsyncIterator[FakeMerger]:
    merger = FakeMerger(host.directory, [agent])
    await merger.start()
    yield merger
    await merger.stop()


async def test_arenas_are_listed(host: ScannerHost, agent: FakeAgent) -> None:
    await agent.open("b", random_pages(10, 1))
    await agent.open("a", random_pages(5, 2))
    await agent.open("c", random_pages(1, 3), "another")
    for _ in range(2):
        await host.service.passes.run_once()
    listed = await host.api.ListScannedArenas(scanner_pb2.ListScannedArenasRequest())
    assert [(a.domain, a.name, a.pages, a.passes, a.stable_pages) for a in listed.arenas] == [
        ("another", "c", 1, 2, 1),
        ("default", "a", 5, 2, 5),
        ("default", "b", 10, 2, 10),
    ]
    assert {arena.pid for arena in listed.arenas} == {os.getpid()}


async def test_status(host: ScannerHost, agent: FakeAgent, merger: FakeMerger) -> None:
    arena = await agent.open("a", random_pages(10, 1))
    await agent.share(arena)
    status = await host.api.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
    assert (status.node, status.agents, status.arenas, status.pages) == ("host-a", 1, 1, 10)
    assert (status.pages_scanned, status.passes) == (10, 1)
    assert (status.merger_connected, status.index_connected) == (True, False)
    assert 0 < status.cpu_seconds < 1000


async def test_pages_are_located_by_fingerprint(host: ScannerHost, agent: FakeAgent) -> None:
    await agent.open("a", random_pages(10, 1))
    await agent.open("b", random_pages(10, 2))
    await agent.open("c", random_pages(10, 1), "another")
    await host.service.passes.run_once()
    domain = host.service.books.domains["default"]
    wanted = domain.arenas[1].pages.fingerprints[7].tobytes() + bytes(15) + b"x"
    found = await host.api.Locate(
        scanner_pb2.LocateRequest(domain_id=domain.identity, fingerprints=wanted)
    )
    ((number, arena, page),) = np.frombuffer(found.places, PLACE).tolist()
    assert (number, page) == (0, 7)
    assert (found.arenas[arena].agent, found.arenas[arena].arena) == (agent.agent, 2)
    nowhere = await host.api.Locate(
        scanner_pb2.LocateRequest(domain_id=bytes(16), fingerprints=wanted)
    )
    assert not nowhere.places


@pytest.mark.parametrize(
    ("domain_id", "fingerprints"),
    [(bytes(15), b""), (bytes(16), bytes(17)), (bytes(16), bytes(16 * 65537))],
)
async def test_malformed_locate(host: ScannerHost, domain_id: bytes, fingerprints: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await host.api.Locate(
            scanner_pb2.LocateRequest(domain_id=domain_id, fingerprints=fingerprints)
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_share_one_arena_or_all(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    for name in "ab":
        await agent.open(name, random_pages(10, 1))
    await agent.open("c", random_pages(3, 2))
    one = await host.api.Share(scanner_pb2.ShareRequest(arena="b"))
    assert (one.outcome.merged, one.outcome.pages) == (10, 10)
    whole = await host.api.Share(scanner_pb2.ShareRequest(domain="default"))
    assert (whole.outcome.shared, whole.outcome.unique, whole.outcome.pages) == (20, 3, 23)


@pytest.mark.parametrize(("domain", "arena"), [("", "b"), ("other", ""), ("other", "a")])
async def test_share_of_what_is_not_there(
    host: ScannerHost, agent: FakeAgent, domain: str, arena: str
) -> None:
    await agent.open("a", random_pages(1, 1))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await host.api.Share(scanner_pb2.ShareRequest(domain=domain, arena=arena))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_share_without_a_merger(host: ScannerHost, agent: FakeAgent) -> None:
    await agent.open("a", random_pages(1, 1))
    with pytest.raises(grpc.aio.AioRpcError, match="start the merger") as error:
        await host.api.Share(scanner_pb2.ShareRequest())
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_share_that_is_given_up_hurts_no_later_one(
    host: ScannerHost, agent: FakeAgent, merger: FakeMerger
) -> None:
    arena = await agent.open("a", random_pages(1, 1))
    merger.hold = asyncio.Event()
    await agent.open("b", random_pages(1, 1))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await host.api.Share(scanner_pb2.ShareRequest(), timeout=0.2)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    merger.hold.set()
    assert (await agent.share(arena))["shared"] == 1


async def test_health_follows_the_merger(host: ScannerHost, agent: FakeAgent) -> None:
    health = host.service.health
    health.started()
    assert not health.serving
    merger = FakeMerger(host.directory)
    await merger.start()
    await host.service.merger.ready()
    await until(lambda: health.serving)
    await merger.stop()
    await until(lambda: not health.serving)


class Command:
    """`python -m samepage_scanner` as a process."""

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        self.ready_file = directory / "ready.json"
        (directory / "secret").write_bytes(b"0123456789abcdef")
        values: dict[str, object] = {
            "node": "host-a",
            "dir": directory,
            "secret_file": directory / "secret",
            "ready_file": self.ready_file,
            **settings,
        }
        self._env = {f"SAMEPAGE_SCANNER_{k.upper()}": str(v) for k, v in values.items()}

    async def __aenter__(self) -> Command:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "samepage_scanner",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self._env},
            stderr=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def serving(self) -> list[str]:
        """Wait until it serves; its addresses."""
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            async for line in self.process.stderr:
                if json.loads(line)["event"] == "serving":
                    ready = json.loads(self.ready_file.read_text())
                    assert ready["pid"] == self.process.pid
                    return list(ready["addresses"])
        raise AssertionError("it ended")


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="samepage-") as name:
        yield Path(name)


async def test_command_serves_and_drains(directory: Path) -> None:
    async with Command(directory, {}) as command:
        tcp, unix = await command.serving()
        assert stat.S_IMODE((directory / "scanner-api.sock").stat().st_mode) == 0o600
        for address in (tcp, unix):
            async with grpc.aio.insecure_channel(address) as channel:
                stub = scanner_pb2_grpc.ScannerStub(channel)
                status = await stub.GetScannerStatus(scanner_pb2.GetScannerStatusRequest())
                assert status.node == "host-a"
                # Its stubs know only the blocking kind of channel.
                health: Any = health_pb2_grpc.HealthStub(channel)
                answer = await health.Check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        agent = await FakeAgent.connect(directory)
        await agent.open("a", random_pages(4, 1))
        command.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await command.process.wait() == 0
            await agent.hung_up.wait()
    assert not (directory / "scanner.sock").exists()
    assert not command.ready_file.exists()


async def test_killed_scanner_leaves_a_socket_that_the_next_one_takes(directory: Path) -> None:
    async with Command(directory, {}) as command:
        await command.serving()
        command.process.kill()
        await command.process.wait()
    async with Command(directory, {}) as command:
        await command.serving()
        agent = await FakeAgent.connect(directory)
        await agent.open("a", random_pages(4, 1))
        agent.close()


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        ({"secret_file": "/nowhere"}, 2, "cannot read the secret file"),
        ({"dir": "/nowhere"}, 2, "create the directory"),
        ({"interval_seconds": "soon"}, 2, "SAMEPAGE_SCANNER_INTERVAL_SECONDS"),
        ({"speed": "9"}, 2, "no such setting"),
    ],
)
async def test_command_says_what_is_wrong(
    directory: Path, settings: Mapping[str, object], code: int, text: str
) -> None:
    async with Command(directory, settings) as command:
        _, errors = await command.process.communicate()
        assert command.process.returncode == code
        last = errors.decode().strip().splitlines()[-1]
        assert last.startswith("samepage-scanner: ")
        assert text in last
