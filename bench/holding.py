"""The benchmarks' side of `bench.holder`, and a host for its arenas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from bench.holder import PAGE
from samepage.cli.cluster import LocalCluster


class Holder:
    """A process that holds memory; ready when this returns.

    Args:
        kind, size, run, seed: see `bench.holder`.
        directory: of the host's sockets.
    """

    def __init__(
        self, kind: str, size: int, run: int = 0, seed: int = 1, directory: Path | None = None
    ) -> None:
        command = [sys.executable, "-m", "bench.holder", kind, *map(str, (size, run, seed))]
        env = {**os.environ, "SAMEPAGE_DIR": str(directory)} if directory else dict(os.environ)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.pid = self._process.pid
        if self._line() != "ready\n":
            self.end()
            raise RuntimeError(f"{' '.join(command)} did not become ready")

    def start(self, *call: object) -> None:
        """Begin a call of `bench.holder.Commands`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()

    def finish(self) -> Any:
        """Return the result of the call that was begun."""
        return json.loads(self._line())

    def call(self, *call: object) -> Any:
        """Call, and return the result."""
        self.start(*call)
        return self.finish()

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def say(text: str) -> None:
    """Tell people, not those who read the JSON lines."""
    print(text, file=sys.stderr)


@asynccontextmanager
async def host() -> AsyncIterator[LocalCluster]:
    """A cluster of one host."""
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as directory:
        async with LocalCluster(Path(directory), 1, say) as cluster:
            yield cluster


def sockets(cluster: LocalCluster) -> Path:
    """The directory of the only host's sockets."""
    return cluster.cluster.hosts[0].directory


def equal_pages(size: int, run: int) -> int:
    """Pages of one holder that another one of its seed has too."""
    pages = size // PAGE
    return pages if run == 0 else pages - len(range(run, pages, run + 1))
