"""What a node and its arenas have in common: the library's node, and how long it lives."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Iterator

from samepage import native
from samepage.errors import ClosedError, ForkedError, InvalidArgumentError

_TIMEOUT_MS_MAX = 2**31 - 1


class Connection:
    """Owns the library's node: freed once, by close() or when nothing needs it any more."""

    def __init__(self, directory: str) -> None:
        self.lock = threading.Lock()
        self._uses = 0
        self._unused = threading.Condition(self.lock)
        self.pid = os.getpid()
        self.pointer = native.connect(directory)
        self._finalizer = weakref.finalize(self, _disconnect, self.pointer, self.pid)
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    @contextlib.contextmanager
    def used(self) -> Iterator[native.NodePointer]:
        """Lend the pointer; close() waits meanwhile, and other uses do not.

        Raises:
            ClosedError: the node is closed.
        """
        with self.lock:
            if self.closed:
                raise ClosedError("the node is closed: connect() again")
            self._uses += 1
        try:
            yield self.pointer
        finally:
            with self._unused:
                self._uses -= 1
                self._unused.notify_all()

    def close(self) -> None:
        with self._unused:
            self._unused.wait_for(lambda: not self._uses)
            self._finalizer()


def _disconnect(pointer: native.NodePointer, pid: int) -> None:
    if os.getpid() == pid:
        native.disconnect(pointer)


def refuse_fork(pid: int) -> None:
    if os.getpid() != pid:
        raise ForkedError(
            f"process {os.getpid()} was forked from {pid}, and arenas are not inherited: "
            "connect() anew"
        )


def milliseconds_of(timeout: float) -> int:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise InvalidArgumentError(f"the timeout {timeout!r} is no number of seconds")
    if not math.isfinite(timeout) or timeout <= 0:
        raise InvalidArgumentError(f"a timeout of {timeout!r} seconds is not positive and finite")
    return min(math.ceil(timeout * 1000), _TIMEOUT_MS_MAX)
