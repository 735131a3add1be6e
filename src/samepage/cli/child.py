"""One daemon as a child process: started, known to be ready, started again when it dies, ended."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from samepage.cli.process import Process, describe_end
from samepage.errors import SamepageError

READY_SECONDS = 60.0
GRACE_SECONDS = 8.0
_POLL_SECONDS = 0.02
_BACKOFF_SECONDS = (0.1, 5.0)
_SETTLED_SECONDS = 10.0
_LOG_LINES = 5


class ChildError(SamepageError):
    """A daemon did not start; the text holds the end of its log."""


@dataclass
class Child:
    """A daemon: `python -m module`, configured by `env`.

    Attributes:
        name: for messages: "host-1/merger".
        module: the service's package.
        env: settings on top of this process's environment.
        ready_file: where the daemon says that it serves.
        log: where its standard error goes.
        listen: the variable that holds its address; kept over restarts.
        metrics_listen: the same for its metrics; empty: it is not asked for any.
        prefix: a command that runs it, such as one that enters a network namespace.
    """

    name: str
    module: str
    env: dict[str, str]
    ready_file: Path
    log: Path
    listen: str
    metrics_listen: str = ""
    prefix: tuple[str, ...] = ()
    address: str = ""
    metrics: str = ""
    _process: Process | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Its process, 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the daemon and wait until it serves.

        Raises:
            ChildError: it ended, or did not serve in time.
        """
        self.ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = Process(
                [*self.prefix, sys.executable, "-m", self.module],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        ready = await self._ready(self._process)
        self.address = ready["address"]
        self.env = {**self.env, self.listen: self.address}
        if self.metrics_listen:
            self.metrics = ready["metrics"]
            self.env[self.metrics_listen] = self.metrics

    async def _ready(self, process: Process) -> dict[str, str]:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise ChildError(f"{self.name} {describe_end(process.returncode)}{self._tail()}")
            if self.ready_file.exists():
                ready: dict[str, str] = json.loads(self.ready_file.read_text())
                return ready
            await asyncio.sleep(_POLL_SECONDS)
        raise ChildError(f"{self.name} did not serve after {READY_SECONDS:.0f} s{self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "".join(f"\n    {line}" for line in lines)

    async def keep(self, say: Callable[[str], None]) -> None:
        """Start the daemon again whenever it ends, until cancelled."""
        wait, most = _BACKOFF_SECONDS
        while True:
            began = time.monotonic()
            if self._process is not None:
                code = await self._process.wait()
                say(f"{self.name} {describe_end(code)}; starting it again")
            if time.monotonic() - began > _SETTLED_SECONDS:
                wait = _BACKOFF_SECONDS[0]
            await asyncio.sleep(wait)
            wait = min(wait * 2, most)
            try:
                await self.start()
                say(f"{self.name} serves again")
            except ChildError as error:
                say(str(error))
                await self.stop()

    async def stop(self) -> None:
        """End the daemon: SIGTERM, and after a grace SIGKILL. Nothing to do when it has ended."""
        if self._process is not None:
            await self._process.end(GRACE_SECONDS)
            self.ready_file.unlink(missing_ok=True)
