"""The demo's cluster: `samepage up` as a child process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from samepage.cli import places
from samepage.cli.child import ChildError
from samepage.cli.cluster import store_directory
from samepage.cli.process import describe_end, end_with_parent

_INDEX = "index"


class DemoCluster:
    """Runs for as long as the context lasts.

    Args:
        directory: where; for it alone.
        hosts: how many.
        say: told what happens, in sentences.

    Raises on entering:
        ChildError: it did not start; `samepage up` has said why on standard error.
    """

    def __init__(self, directory: Path, hosts: int, say: Callable[[str], None]) -> None:
        self._directory = directory
        self._hosts = hosts
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self.cluster = places.Cluster(())

    def store(self, host: str) -> Path:
        """The directory of the host's store, on a tmpfs."""
        return store_directory(self._directory, host)

    def pids(self) -> dict[str, int]:
        """The daemons' processes: "index", and "merger" and "scanner" under each host's name."""
        files = {_INDEX: self._directory / "index.ready"}
        for host in self.cluster.hosts:
            for service in ("merger", "scanner"):
                files[f"{host.name}/{service}"] = host.directory / f"{service}.ready"
        return {name: _pid(file) for name, file in files.items()}

    async def __aenter__(self) -> Self:
        parent = os.getpid()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "samepage", "up", "--json"),
            *("--dir", str(self._directory), "--hosts", str(self._hosts)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,
            preexec_fn=lambda: end_with_parent(parent),
        )
        try:
            await self._wait_until_ready(self._process)
        except BaseException:
            await self._stop(self._process)
            raise
        self._listener = asyncio.create_task(self._listen(self._process))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None and self._listener is not None
        self._listener.cancel()
        await asyncio.wait({self._listener})
        await self._stop(self._process)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        while (event := await _read(process))["event"] != "ready":
            if event["event"] == "end":
                end = describe_end(await process.wait())
                raise ChildError(f"the demo's cluster did not start: 'samepage up' {end}")
        self.cluster = places.read(self._directory / places.CLUSTER_FILE)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what it says, such as that a daemon died."""
        while (event := await _read(process))["event"] != "end":
            self._say(event.get("text", ""))

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    return json.loads(line) if line else {"event": "end"}


def _pid(file: Path) -> int:
    try:
        pid: int = json.loads(file.read_text())["pid"]
        return pid
    except FileNotFoundError:
        return 0  # it is being started again
