"""Runs `samepage-arenas` for a test, and calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from samepage.v1 import arenas_pb2 as pb
from samepage.v1 import arenas_pb2_grpc

CHUNK = 1 << 20
_SECONDS = 30.0


class ArenasProcess:
    """The helper as a process of its own.

    Args:
        directory: the socket directory of its host.
        folder: for its own socket, ready file and log.
        command: runs it; default: its module.
        settings: of its config.
    """

    def __init__(
        self,
        directory: Path,
        folder: Path,
        command: tuple[str, ...] = ("-m", "samepage_merger.holding"),
        **settings: object,
    ) -> None:
        self.ready_file = folder / "arenas.ready"
        self.api_socket = folder / "arenas.sock"
        self._log = folder / "arenas.log"
        defaults = {"dir": directory, "api_socket": self.api_socket, "ready_file": self.ready_file}
        values = {
            f"SAMEPAGE_ARENAS_{name.upper()}": str(value)
            for name, value in (defaults | settings).items()
        }
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=os.environ | paths | values, stderr=log
            )

    @property
    def log(self) -> str:
        """What it said."""
        return self._log.read_text()

    def address(self) -> str:
        """Return its TCP address once it serves."""
        deadline = time.monotonic() + _SECONDS
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)
        address: str = json.loads(self.ready_file.read_text())["address"]
        return address

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_SECONDS)


@contextmanager
def arenas_process(directory: Path, folder: Path, **options: Any) -> Iterator[ArenasProcess]:
    """Run a helper for as long as the context lasts."""
    helper = ArenasProcess(directory, folder, **options)
    try:
        yield helper
    finally:
        helper.end()


class Client:
    """Calls of one helper, in few words."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: arenas_pb2_grpc.ArenasAsyncStub = arenas_pb2_grpc.ArenasStub(channel)

    async def create(self, arena: str, size: int, domain: str = "") -> pb.HeldArena:
        request = pb.CreateArenaRequest(domain=domain, arena=arena, size=size)
        return (await self.stub.CreateArena(request)).arena

    async def write(self, arena: str, data: bytes, offset: int = 0, domain: str = "") -> int:
        """Write in chunks of 1 MiB; return how many bytes the helper says it wrote."""
        chunks = [(offset + at, data[at : at + CHUNK]) for at in range(0, len(data), CHUNK) or (0,)]
        requests = [target(arena, domain), *(chunk(at, part) for at, part in chunks)]
        return (await self.stub.WriteArena(iter(requests))).written_bytes

    async def read(self, arena: str, offset: int = 0, length: int = 0, domain: str = "") -> bytes:
        """Read, and see that the chunks follow on each other."""
        request = pb.ReadArenaRequest(domain=domain, arena=arena, offset=offset, length=length)
        found = bytearray()
        async for part in self.stub.ReadArena(request):
            assert part.offset == offset + len(found)
            assert 0 < len(part.data) <= CHUNK
            found += part.data
        return bytes(found)

    async def stat(self, arena: str, domain: str = "") -> pb.StatArenaResponse:
        return await self.stub.StatArena(pb.StatArenaRequest(domain=domain, arena=arena))

    async def share(self, arena: str, **options: Any) -> Any:
        request = pb.ShareArenaRequest(arena=arena, **options)
        return (await self.stub.ShareArena(request)).outcome

    async def discard(self, arena: str, offset: int, length: int = 0) -> None:
        request = pb.DiscardArenaRequest(arena=arena, offset=offset, length=length)
        await self.stub.DiscardArena(request)

    async def delete(self, arena: str, domain: str = "") -> None:
        await self.stub.DeleteArena(pb.DeleteArenaRequest(domain=domain, arena=arena))

    async def names(self, domain: str = "") -> list[str]:
        found = await self.stub.ListHeldArenas(pb.ListHeldArenasRequest(domain=domain))
        return [arena.arena for arena in found.arenas]

    async def status(self) -> pb.GetArenasStatusResponse:
        return await self.stub.GetArenasStatus(pb.GetArenasStatusRequest())


def target(arena: str, domain: str = "") -> pb.WriteArenaRequest:
    """The first message of a write."""
    return pb.WriteArenaRequest(target=pb.WriteTarget(domain=domain, arena=arena))


def chunk(offset: int, data: bytes) -> pb.WriteArenaRequest:
    """Any other message of a write."""
    return pb.WriteArenaRequest(chunk=pb.WriteChunk(offset=offset, data=data))


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    """A client of the helper at `address`."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Client(channel)
