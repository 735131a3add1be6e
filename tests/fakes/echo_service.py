"""A service that does next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.core import Metric

from samepage.daemon.metrics import gauge
from samepage.daemon.server import Health
from samepage.daemon.tls import TlsFiles


class Echo:
    """A service with one streaming method that runs until it is drained."""

    name = "echo"
    drain_seconds = 5.0
    reflection = False
    tls_files: TlsFiles | None = None
    health_listen = ""

    def __init__(self, listen: Sequence[str], ready_file: Path, metrics_listen: str = "") -> None:
        self.listen = listen
        self.metrics_listen = metrics_listen
        self.ready_file = ready_file
        self.health = Health(["test.Echo"])
        self.draining = asyncio.Event()
        self.steps: list[str] = []

    def register(self, server: grpc.aio.Server) -> None:
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(
            self.stream
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Echo", {"Stream": handler}),)
        )

    async def stream(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield request
        await self.draining.wait()
        yield b"drained"

    async def start(self) -> None:
        self.steps.append("start")

    async def metrics(self) -> Iterable[Metric]:
        return [gauge("echo_steps", "Steps so far.", len(self.steps))]

    async def drain(self) -> None:
        self.steps.append("drain")
        self.draining.set()

    async def close(self) -> None:
        self.steps.append("close")
