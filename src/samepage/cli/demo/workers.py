"""The demo's end of its workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from samepage.cli.demo.files import Input, arena_bytes
from samepage.cli.places import Host
from samepage.cli.process import describe_end
from samepage.errors import SamepageError

OWN_BYTES = 32 * 2**20
_GRACE_SECONDS = 10.0
_LINE_BYTES_MAX = 4 * 2**20


class WorkerError(SamepageError):
    """A worker failed; the text says how."""


class WorkerProcess:
    """A worker of one host: a process with one arena.

    Args:
        host: whose daemons it uses.
        name: its own, and its arena's.
        loaded: told how many more bytes it has loaded.
    """

    def __init__(self, host: Host, name: str, loaded: Callable[[int], None]) -> None:
        self.host = host
        self.name = name
        self._loaded = loaded
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Its process, 0 before it is started."""
        return 0 if self._process is None else self._process.pid

    @property
    def full_name(self) -> str:
        """Its host's name and its own."""
        return f"{self.host.name}/{self.name}"

    async def start(self, inputs: list[Input]) -> None:
        """Start it, and wait until it has loaded the files.

        Raises:
            WorkerError: it failed.
        """
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "samepage.cli.demo.worker",
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            process_group=0,
        )
        own_offset = arena_bytes(inputs)
        plan = {
            "dir": str(self.host.directory),
            "name": self.name,
            "inputs": [dataclasses.asdict(file) for file in inputs],
            "own_offset": own_offset,
            "size": own_offset + OWN_BYTES,
        }
        self._send(plan)
        await self._answer()

    async def do(self, action: str, **details: Any) -> dict[str, Any]:
        """Have it do something, and return its answer.

        Raises:
            WorkerError: it failed.
        """
        self._send({"do": action, **details})
        return await self._answer()

    async def stop(self) -> None:
        """End it: by the end of its input, and after a grace by force."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(_GRACE_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise WorkerError(f"{self.full_name}: {message['error']}")
            if "answer" in message:
                return message
            self._loaded(message["loaded_bytes"])
        end = describe_end(await self._process.wait())
        raise WorkerError(f"{self.full_name} {end}")
