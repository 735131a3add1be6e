"""Runs `samepage up` for a test."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samepage.cli import places

_SERVICES = {
    "samepage_index": "index",
    "samepage_merger": "merger",
    "samepage_merger.holding": "arenas",
    "samepage_scanner": "scanner",
}

# A daemon that dies again and again is started later and later, but for tests that kill them.
_AT_ONCE = """
from samepage.cli import child, main
child._BACKOFF_SECONDS = (0.05, 0.05)
main()
"""


def samepage(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "samepage", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


class Up:
    """A running `samepage up`.

    Args:
        env: more of the daemons' environment; daemons that are killed are started at once then.

    Attributes:
        directory: its --dir.
        process: it.
        cluster: what its cluster.json says.
    """

    def __init__(
        self, directory: Path, hosts: int, *options: str, env: dict[str, str] | None = None
    ) -> None:
        self.directory = directory
        chosen = ["--json", "--dir", str(directory), "--hosts", str(hosts), *options]
        program = ["-m", "samepage"] if env is None else ["-c", _AT_ONCE]
        self.process = subprocess.Popen(
            [sys.executable, *program, "up", *chosen],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.wait_for("ready")
        self.cluster = places.read(directory / places.CLUSTER_FILE)

    def host(self, number: int = 1) -> Path:
        """The socket directory of a host."""
        return self.cluster.hosts[number - 1].directory

    def wait_for(self, event: str, text: str = "") -> dict[str, Any]:
        """Return its next message of this kind that holds `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message: dict[str, Any] = json.loads(line)
            if message["event"] == event and text in message.get("text", ""):
                return message
        raise AssertionError(f"'samepage up' ended without saying {event} {text}")

    def daemons(self) -> dict[str, int]:
        """The daemons' processes: "index", and "merger" and so on under each host's name."""
        found = {}
        for pid in descendants(self.process.pid):
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                continue
            settings = dict(line.split("=", 1) for line in environment if "=" in line)
            service = _SERVICES.get(arguments[2]) if arguments[1:2] == ["-m"] else None
            if service is not None:
                node = settings.get(f"SAMEPAGE_{service.upper()}_NODE")
                found[f"{node}/{service}" if node else service] = pid
        return found

    def stop(self) -> int:
        """End it in order; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)
        return self.process.returncode


@contextmanager
def running(
    directory: Path, hosts: int = 1, *options: str, env: dict[str, str] | None = None
) -> Iterator[Up]:
    """Run a cluster for as long as the context lasts."""
    up = Up(directory, hosts, *options, env=env)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.stop()


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> None:
    """Return when all these processes have ended.

    Raises:
        TimeoutError: one has not, after `seconds`.
    """
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not _ended(descriptor, seconds):
                raise TimeoutError(f"process {pid} is still there")
        finally:
            os.close(descriptor)


def _ended(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
