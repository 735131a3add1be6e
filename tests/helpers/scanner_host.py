"""A real scanner inside the test's process, in a directory of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from samepage.v1 import scanner_pb2_grpc
from samepage_scanner.config import Config
from samepage_scanner.service import ScannerService

# Background passes come when a test calls run_once().
_NEVER = 3600.0


class ScannerHost:
    """Starts on `async with`. Settings are those of samepage_scanner.config."""

    def __init__(self, **settings: Any) -> None:
        # Unix sockets have short names, so no directory of pytest's.
        self._temporary = tempfile.TemporaryDirectory(prefix="samepage-")
        self.directory = Path(self._temporary.name)
        (self.directory / "secret").write_bytes(b"a secret of the tests\n")
        defaults: dict[str, Any] = {
            "node": "host-a",
            "dir": self.directory,
            "secret_file": self.directory / "secret",
            "interval_seconds": _NEVER,
            "interval_max_seconds": _NEVER,
            "cpu_percent": 100.0,
        }
        self.config = Config(**(defaults | settings))

    async def __aenter__(self) -> ScannerHost:
        self.service = ScannerService(self.config)
        self._server = grpc.aio.server()
        self.service.register(self._server)
        address = f"unix:{self.directory}/scanner-api.sock"
        self._server.add_insecure_port(address)
        await self.service.start()
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(address)
        self.api = scanner_pb2_grpc.ScannerStub(self._channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()
        await self.service.close()
        await self._server.stop(None)
        self._temporary.cleanup()
