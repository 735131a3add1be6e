"""What grpc.aio does with bytes alone: `python -m bench.stream serve HOST`, `... read ADDRESS`.

`serve` prints its port; its `Bytes` streams a number of bytes in messages of MESSAGE_BYTES, its
`Nothing` answers at once. `read` prints a line of JSON for each line of input: `["stream", BYTES]`
says how many seconds that many bytes took, `["trips", COUNT]` how many nanoseconds each of so many
empty calls took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

MESSAGE_BYTES = 1 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
_SERVICE = "samepage.bench.Stream"

Context = grpc.aio.ServicerContext[Any, Any]


async def _bytes(request: bytes, context: Context) -> AsyncIterator[bytes]:
    message = os.urandom(MESSAGE_BYTES)
    for _ in range(int(request) // MESSAGE_BYTES):
        yield message


async def _nothing(request: bytes, context: Context) -> bytes:
    return b""


async def serve(host: str) -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server(options=list(_OPTIONS))
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Bytes": grpc.unary_stream_rpc_method_handler(_bytes),
        "Nothing": grpc.unary_unary_rpc_method_handler(_nothing),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port(f"{host}:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def read(address: str) -> None:
    """Measure, line by line of standard input."""
    async with grpc.aio.insecure_channel(address, options=list(_OPTIONS)) as channel:
        for line in sys.stdin:
            kind, count = json.loads(line)
            measure = _stream if kind == "stream" else _trips
            print(json.dumps(await measure(channel, count)), flush=True)


async def _stream(channel: grpc.aio.Channel, count: int) -> float:
    call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
        f"/{_SERVICE}/Bytes"
    )
    began, got = time.perf_counter(), 0
    async for message in call(b"%d" % count):
        got += len(message)
    assert got == count // MESSAGE_BYTES * MESSAGE_BYTES
    return time.perf_counter() - began


async def _trips(channel: grpc.aio.Channel, count: int) -> list[int]:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        f"/{_SERVICE}/Nothing"
    )
    took = []
    for _ in range(count):
        began = time.perf_counter_ns()
        await call(b"")
        took.append(time.perf_counter_ns() - began)
    return took


if __name__ == "__main__":
    role, where = sys.argv[1:]
    asyncio.run(serve(where) if role == "serve" else read(where))
