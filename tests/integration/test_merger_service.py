"""The merger as it runs: a process of its own with its gRPC API, stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes.fake_merging_agent import FakeArena, FakeMergingAgent, random_pages
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.merger_host import open_directory, store_directory

from samepage.daemon.wire import PAGE_SIZE, Outcome
from samepage.v1 import merger_pb2, merger_pb2_grpc
from samepage_merger.config import Config
from samepage_merger.merging import RUN, ZERO_LEADER
from samepage_merger.orders import NO_HEADROOM
from samepage_merger.pairs import OUTCOMES

KILLS = 12
PAGES = 400


class Merger:
    """A merger process on a socket directory and a store of its own."""

    def __init__(self, directory: Path, store: Path) -> None:
        self.directory = directory
        self.store = store
        self.ready = directory / "ready.json"
        self.process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        secret = self.directory / "secret"
        secret.write_text("a secret of more than 16 bytes\n")
        settings = {
            "NODE": "test",
            "DIR": self.directory,
            "STORE_DIR": self.store,
            "SECRET_FILE": secret,
            "READY_FILE": self.ready,
            "ORDER_TIMEOUT_SECONDS": "1",
        }
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **{f"SAMEPAGE_MERGER_{name}": str(value) for name, value in settings.items()},
        }

    async def start(self) -> None:
        self.ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "samepage_merger"]
        self.process = subprocess.Popen(command, env=self.environment())
        async with asyncio.timeout(30):
            while not self.ready.exists():
                assert self.process.poll() is None
                await asyncio.sleep(0.01)
        address = json.loads(self.ready.read_text())["address"]
        self.channel = grpc.aio.insecure_channel(address)
        self.api = merger_pb2_grpc.MergerStub(self.channel)

    async def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        await self.channel.close()
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 20)

    async def merge(
        self, domain: str, arenas: list[FakeArena], *runs: tuple[int, int, int, int, int]
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        request = merger_pb2.MergeRequest(
            domain=domain,
            arenas=[merger_pb2.ArenaKey(agent=a.owner.agent, arena=a.number) for a in arenas],
            runs=np.array(list(runs), RUN).tobytes(),
        )
        merged = np.zeros((len(arenas), OUTCOMES), np.int64)
        responses = [response async for response in self.api.Merge(request)]
        assert [r.done for r in responses] == [False] * (len(responses) - 1) + [True]
        for response in responses:
            for o in response.outcomes:
                counts = (o.merged, o.differs, o.pinned, o.absent, o.busy, o.no_mapping)
                merged[o.arena] += (*counts, o.unsupported, o.gone, o.no_headroom, o.displaced)
        assert sum(r.pages_done for r in responses) == sum(run[4] for run in runs)
        return merged

    async def status(self) -> merger_pb2.GetMergerStatusResponse:
        return await self.api.GetMergerStatus(merger_pb2.GetMergerStatusRequest())

    async def assert_exact(self, *arenas: FakeArena) -> None:
        """The status is what the arenas map; freeing may take the janitor a moment."""
        slots = np.concatenate([arena.slots[arena.slots != 0] for arena in arenas])
        async with asyncio.timeout(10):
            while True:
                status = await self.status()
                if status.store_bytes == np.unique(slots).size * PAGE_SIZE:
                    break
                await asyncio.sleep(0.05)
        assert status.shared_pages == slots.size
        assert status.slots == np.unique(slots).size
        assert status.saved_bytes == (status.shared_pages - status.slots) * PAGE_SIZE


@pytest.fixture
def store() -> Iterator[Path]:
    with store_directory() as path:
        open_directory(path).close()
        yield path


@pytest.fixture
async def merger(tmp_path: Path, store: Path) -> AsyncIterator[Merger]:
    merger = Merger(tmp_path, store)
    await merger.start()
    yield merger
    if merger.process is not None and merger.process.poll() is None:
        await merger.end(signal.SIGKILL)


@pytest.fixture
async def agents(merger: Merger) -> AsyncIterator[list[FakeMergingAgent]]:
    agents = [FakeMergingAgent(merger.directory / "merger.sock") for _ in range(2)]
    for agent in agents:
        await agent.connect()
    yield agents
    for agent in agents:
        await agent.die()


async def test_the_api(merger: Merger, agents: list[FakeMergingAgent]) -> None:
    assert agents[0].welcome_descriptors == (2 if os.path.exists("/dev/userfaultfd") else 1)
    data = random_pages(1, PAGES)
    data[:50] = 0
    arenas = [await agent.open(f"arena-{n}", data, "d") for n, agent in enumerate(agents)]
    zeros = [(ZERO_LEADER, n, 0, 0, 50) for n in range(2)]
    merged = await merger.merge("d", arenas, *zeros, (0, 1, 50, 50, PAGES - 50))
    assert merged[:, Outcome.MERGED].tolist() == [PAGES, PAGES]
    await merger.assert_exact(*arenas)
    listed = (await merger.api.ListArenas(merger_pb2.ListArenasRequest())).arenas
    assert [(a.name, a.domain, a.pid, a.pages, a.shared_pages, a.saved_bytes) for a in listed] == [
        (f"arena-{n}", "d", os.getpid(), PAGES, PAGES - 50, (PAGES - 50) * PAGE_SIZE // 2)
        for n in range(2)
    ]
    response = await merger.api.Unshare(merger_pb2.UnshareRequest(domain="d", arena="arena-1"))
    assert response.restored == PAGES - 50
    await merger.assert_exact(*arenas)
    status = await merger.status()
    assert (status.node, status.agents, status.arenas) == ("test", 2, 2)
    assert (status.merged_total, status.restored_total) == (2 * PAGES, PAGES - 50)
    assert status.cpu_seconds > 0


async def test_errors_of_the_api(merger: Merger, agents: list[FakeMergingAgent]) -> None:
    arena = await agents[0].open("arena", random_pages(1, 10))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await merger.merge("default", [arena], (0, 0, 0, 5, 6))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "outside arena 0 of 10 pages" in str(error.value.details())
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await merger.api.Unshare(merger_pb2.UnshareRequest(arena="missing"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await merger.api.Unshare(merger_pb2.UnshareRequest(domain="-", arena="missing"))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_policy_is_changed_while_it_runs(
    merger: Merger, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, PAGES)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    policy = (await merger.api.GetPolicy(merger_pb2.GetMergerPolicyRequest())).policy
    for field in policy.DESCRIPTOR.fields:
        assert policy.HasField(field.name)  # type: ignore[arg-type]  # a name that is one
        assert getattr(policy, field.name) == getattr(Config(node="test"), field.name)
    policy = merger_pb2.MergerPolicy(headroom_percent=100.0, memory_ceiling_bytes=99 * PAGE_SIZE)
    await merger.api.SetPolicy(merger_pb2.SetMergerPolicyRequest(policy=policy))
    merged = await merger.merge("default", arenas, (0, 1, 0, 0, PAGES))
    assert merged[1, Outcome.MERGED] == 99 and merged[1, NO_HEADROOM] == PAGES - 99
    status = await merger.status()
    assert (status.headroom_bytes, status.no_headroom_total) == (0, PAGES - 99)
    assert status.available_bytes == 99 * PAGE_SIZE
    policy = merger_pb2.MergerPolicy(memory_ceiling_bytes=0, store_limit_bytes=150 * PAGE_SIZE)
    answer = await merger.api.SetPolicy(merger_pb2.SetMergerPolicyRequest(policy=policy))
    assert (answer.policy.headroom_percent, answer.policy.store_limit_bytes) == (100, 614400)
    merged = await merger.merge("default", arenas, (0, 1, 0, 0, PAGES))
    assert merged[1, Outcome.MERGED] == 51 and merged[1, Outcome.BUSY] == PAGES - 150
    bad = merger_pb2.MergerPolicy(headroom_percent=101.0, store_limit_bytes=0)
    with pytest.raises(grpc.aio.AioRpcError, match="headroom_percent must be 0 to 100") as error:
        await merger.api.SetPolicy(merger_pb2.SetMergerPolicyRequest(policy=bad))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    again = (await merger.api.GetPolicy(merger_pb2.GetMergerPolicyRequest())).policy
    assert again == answer.policy


async def test_the_operators_socket_and_health(merger: Merger) -> None:
    path = merger.directory / "merger-api.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="samepage.v1.Merger"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_stop_keeps_what_is_mapped_and_removes_what_is_not(
    merger: Merger, agents: list[FakeMergingAgent]
) -> None:
    data = random_pages(1, PAGES)
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]
    await merger.merge("default", arenas, (0, 1, 0, 0, PAGES))
    assert await merger.end(signal.SIGTERM) == 0
    assert all(arena.view() == data.tobytes() for arena in arenas)
    assert list(merger.store.iterdir())
    for agent in agents:
        await agent.die()
    await merger.start()
    assert (await merger.status()).store_bytes == 0
    assert await merger.end(signal.SIGTERM) == 0
    assert not merger.store.exists()


async def test_killed_at_any_instant(merger: Merger, agents: list[FakeMergingAgent]) -> None:
    """The bytes stay, and the next merger's books are what the agents map."""
    generator = np.random.default_rng(11)
    data = random_pages(1, PAGES)
    expected = [[page.tobytes() for page in data] for _ in agents]
    arenas = [await agent.open(f"arena-{n}", data) for n, agent in enumerate(agents)]

    def write(row: int) -> None:
        page = int(generator.integers(0, PAGES))
        # Bytes that both arenas may come to have, so that pages merge again.
        expected[row][page] = bytes([page % 251]) * PAGE_SIZE
        with contextlib.suppress(ConnectionError):
            agents[row].write(arenas[row], page, expected[row][page])

    for row, agent in enumerate(agents):
        agent.before_order = lambda order, row=row: write(row)  # type: ignore[misc]
    for _ in range(KILLS):
        merging = asyncio.ensure_future(merger.merge("default", arenas, (0, 1, 0, 0, PAGES)))
        await asyncio.wait({merging}, timeout=float(generator.uniform(0, 0.03)))
        await merger.end(signal.SIGKILL)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await merging
        for row, arena in enumerate(arenas):
            assert arena.view() == b"".join(expected[row])
            write(row)
        await merger.start()
        for agent, arena in zip(agents, arenas, strict=True):
            await agent.disconnect()
            await agent.connect()
            await agent.announce(arena)
        await merger.assert_exact(*arenas)
    await merger.merge("default", arenas, (0, 1, 0, 0, PAGES))
    for row, (agent, arena) in enumerate(zip(agents, arenas, strict=True)):
        await agent.flushed()
        assert arena.slots.any()
        assert arena.view() == b"".join(expected[row])
    await merger.assert_exact(*arenas)


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"SECRET_FILE": "/nonexistent"}, 2, "cannot read the secret file"),
        ({"STORE_DIR": "/proc/sys"}, 1, "not on a tmpfs"),
        ({"STORE_DIR": "/dev/shm/no/such/parent"}, 1, "set store_dir"),
        ({"DIR": "/proc/nowhere"}, 2, "set dir"),
        ({"ORDER_TIMEOUT_SECONDS": "0"}, 2, "order_timeout_seconds must be more than 0"),
        ({"STORE_LIMIT_BYTES": "-1"}, 2, "store_limit_bytes"),
        ({"NODE": "a/b"}, 2, "node must be"),
        ({"NOTHING": "1"}, 2, "there is no such setting"),
    ],
)
def test_what_cannot_start_says_why(
    tmp_path: Path, store: Path, change: dict[str, str], code: int, text: str
) -> None:
    changed = {f"SAMEPAGE_MERGER_{name}": value for name, value in change.items()}
    done = subprocess.run(
        [sys.executable, "-m", "samepage_merger"],
        env={**Merger(tmp_path, store).environment(), **changed},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == code
    assert text in done.stderr and "Traceback" not in done.stderr


async def test_two_mergers_never_have_one_store(merger: Merger) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "samepage_merger"],
        env=merger.environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "another merger uses store_dir" in done.stderr
    assert (await merger.status()).node == "test"


def test_the_stores_path_follows_the_node() -> None:
    assert Config(node="host-a").store_path == Path("/dev/shm/samepage-host-a")
