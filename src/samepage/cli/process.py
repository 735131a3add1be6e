"""A child process whose end can be awaited, without a thread.

The child has a process group of its own, so that Ctrl-C in a terminal reaches only its parent,
which then ends it in order. When the parent is killed outright, the kernel sends the child a
SIGTERM (PR_SET_PDEATHSIG): once for each of the parent's threads that dies while others live, and
a daemon takes the second SIGTERM as "at once". So a parent of daemons has no threads, and this
module is used instead of asyncio's, which has one a child in Python 3.11.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends; called in the child."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class Process:
    """A running child. `options` are those of subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        parent = os.getpid()
        self._popen = subprocess.Popen(
            arguments, process_group=0, preexec_fn=lambda: end_with_parent(parent), **options
        )
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Return its exit code, or minus the signal that ended it, when it has ended."""
        return await asyncio.shield(self._ended)

    async def end(self, grace: float) -> None:
        """Send SIGTERM, and SIGKILL after `grace` seconds; return when it has ended."""
        self._send(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self.wait()
        except TimeoutError:
            self._send(signal.SIGKILL)
            await self.wait()

    def _send(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._popen.send_signal(number)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(self._popen.wait())


def describe_end(code: int) -> str:
    """Say how a process with this return code ended."""
    if code < 0:
        return f"was ended by signal {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
