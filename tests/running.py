"""A whole cluster for a test: `samepage up` as a process of its own."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

COMMAND = (sys.executable, "-m", "samepage.cli")
READY_SECONDS = 60.0


class Running:
    """`samepage up`, ready; its daemons by name."""

    def __init__(self, directory: Path, hosts: int = 1, env: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [*COMMAND, "up", "--hosts", str(hosts), "--dir", str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._await_ready()

    def _await_ready(self) -> None:
        assert self.process.stdout is not None
        line = ""
        while line != "ready\n":
            if not select.select([self.process.stdout], [], [], READY_SECONDS)[0]:
                raise TimeoutError(f"the cluster was not ready in {READY_SECONDS} s")
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"samepage up ended with {self.process.wait()}: {self.logs()}")

    def host(self, number: int = 1) -> Path:
        """A host's socket directory."""
        return self.directory / f"host-{number}"

    def address(self, service: str, host: int = 1) -> str:
        """A daemon's gRPC address."""
        return str(self._ready(service, host)["address"])

    def pid(self, service: str, host: int = 1) -> int:
        """A daemon's process."""
        return int(self._ready(service, host)["pid"])

    def _ready(self, service: str, host: int) -> dict[str, str]:
        base = self.directory if service == "index" else self.host(host)
        answer: dict[str, str] = json.loads((base / f"{service}.ready").read_text())
        return answer

    def await_restart(self, service: str, old: int, host: int = 1) -> int:
        """Wait until another process than `old` serves; its pid."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                pid = self.pid(service, host)
            except (FileNotFoundError, json.JSONDecodeError):
                pid = old
            if pid != old:
                return pid
            time.sleep(0.02)
        raise TimeoutError(f"{service} did not come back: {self.logs()}")

    def logs(self) -> str:
        """The end of every daemon's log."""
        found = []
        for path in sorted((self.directory / "logs").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            found.append(f"--- {path.name}\n" + "\n".join(lines[-15:]))
        return "\n".join(found)

    def stop(self) -> None:
        """End it as a user would, and see that it ends well."""
        if self.process.poll() is None:
            self.process.terminate()
        status = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert status == 0, f"samepage up ended with {status}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
