"""Programs that run for a test, each with a log, in the machine's namespaces or others."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_READY_SECONDS = 180.0
_END_SECONDS = 30.0
_LOG_LINES = 20

#: Waits until something, by what it is called, is so.
Until = Callable[[str, Callable[[], bool]], None]


class Processes:
    """Programs by name.

    Args:
        directory: for their logs.
        enter: what a command begins with to run where they do; nothing: here.
    """

    def __init__(self, directory: Path, enter: tuple[str, ...] = ()) -> None:
        self._directory = directory
        self._enter = enter
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._running

    def start(self, name: str, *command: str | Path) -> int:
        """Start a program; return its process id."""
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._enter, *map(str, command)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the tests alone, which end it in order
            )
        self._running[name] = process
        return process.pid

    def end(self, name: str) -> None:
        """End a program, if it was started, and wait for that."""
        process = self._running.pop(name, None)
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def end_all(self) -> None:
        """End all of them, the last started first."""
        for name in reversed(list(self._running)):
            self.end(name)

    def check(self) -> None:
        """Raise RuntimeError with the end of its log when one has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended ({process.returncode}):\n{self._log(name)}")

    def _log(self, name: str) -> str:
        text = (self._directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_LINES:])


def until(what: str, condition: Callable[[], bool], check: Callable[[], None]) -> None:
    """Wait until something is so; `check` raises when it never will be.

    Raises:
        TimeoutError: it is not after three minutes.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not so after {_READY_SECONDS:.0f} s")
        check()
        time.sleep(0.2)
