"""An arena: memory of this process whose pages may be shared, or be away.

Its memory belongs to a ctypes array (`_Memory`) that every view of it keeps alive; when the last
view is gone, a finalizer unmaps it (client.py says more of lifetimes).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from types import TracebackType
from typing import Self

from samepage import native
from samepage.connection import Connection, milliseconds_of, refuse_fork
from samepage.errors import ClosedError, InvalidArgumentError, OutOfMemoryError
from samepage.reports import PAGE_SIZE, ArenaStats, EvictReport, ShareReport


class Arena:
    """A region of this process's memory that may be shared; made by `Node.create_arena()`.

    A context manager: leaving it closes the arena. Methods may be called from any thread.
    """

    def __init__(self, connection: Connection, pointer: native.ArenaPointer, name: str) -> None:
        self._connection = connection
        self._pointer = pointer
        self._name = name
        self._domain = native.arena_domain(pointer)
        self._size = native.arena_size(pointer)
        self._sealed = native.arena_sealed(pointer)
        self._memory: ctypes.Array[ctypes.c_ubyte] | None = _own(connection, pointer, self._size)

    @property
    def name(self) -> str:
        """Its name, unique in its domain on this host."""
        return self._name

    @property
    def domain(self) -> str:
        """Who may share with it."""
        return self._domain

    @property
    def size(self) -> int:
        """Bytes, in whole pages."""
        return self._size

    @property
    def closed(self) -> bool:
        """Whether it, or its node, was closed."""
        return self._memory is None or self._connection.closed

    @property
    def sealed(self) -> bool:
        """Whether it can only be read."""
        return self._sealed

    @property
    def buffer(self) -> memoryview:
        """A writable view of the arena's bytes, for numpy.frombuffer and the like; read-only once
        the arena is sealed.

        Stays valid after close(), with the same bytes, for as long as anything refers to it.

        Raises:
            ClosedError, ForkedError: as they say.
        """
        view = memoryview(self._open()).cast("B")
        return view.toreadonly() if self._sealed else view

    def share(self, timeout: float = 30.0) -> ShareReport:
        """Merge the pages that are equal to others on this host, now; wait until done.

        Args:
            timeout: seconds.

        Raises:
            ShareTimeoutError: it took longer; what was begun goes on.
            ServiceUnavailableError: the scanner or the merger is away.
            UnsupportedKernelError: the kernel lacks what it takes.
            InvalidArgumentError: a timeout that is no positive number.
            ClosedError, ForkedError: as they say.
        """
        milliseconds = milliseconds_of(timeout)
        memory = self._open()
        try:
            return native.share(self._pointer, milliseconds)
        finally:
            del memory

    def stats(self) -> ArenaStats:
        """Count the arena's pages by state, as the kernel shows them.

        Raises:
            ClosedError, ForkedError: as they say.
        """
        memory = self._open()
        try:
            return native.stats(self._pointer)
        finally:
            del memory

    def seal(self) -> None:
        """Make the arena read-only for good. Its pages then merge even where the kernel has no
        userfaultfd. Twice is fine.

        Views and arrays that were taken before still say that they are writable, but **a write
        through one of them ends the process with SIGSEGV**: drop them, and take `buffer` anew. I/O
        into the arena must have come to its end.

        Raises:
            PinnedError: pages are pinned for I/O.
            OutOfMemoryError: no mapping is left to do it with.
            ClosedError, ForkedError: as they say.
        """
        memory = self._open()
        try:
            native.seal(self._pointer)
        finally:
            del memory
        self._sealed = True

    def discard(self, offset: int, size: int) -> None:
        """Give the memory of whole pages back to the system: they read as zeros from now on.

        Args:
            offset: bytes from the arena's start.
            size: bytes; both are whole pages of 4096.

        Raises:
            InvalidArgumentError: no whole pages, or not inside the arena.
            SealedError: the arena can only be read.
            OutOfMemoryError: no mapping is left to do it with.
            ClosedError, ForkedError: as they say.
        """
        memory = self._open()
        self._check_range(offset, size)
        try:
            native.discard(self._pointer, offset, size)
        finally:
            del memory

    def fetch(self, offset: int = 0, size: int | None = None, timeout: float = 30.0) -> None:
        """Bring pages back that are on other hosts, and wait until they are here.

        A touch does that too, page by page, and waits for as long as it takes.

        Args:
            offset: bytes from the arena's start.
            size: bytes; default: up to the arena's end.
            timeout: seconds.

        Raises:
            LostError: no host has them any more.
            FetchTimeoutError: it took longer; they go on coming.
            InvalidArgumentError: not inside the arena, or a timeout that is no positive number.
            ClosedError, ForkedError: as they say.
        """
        milliseconds = milliseconds_of(timeout)
        memory = self._open()
        first, end = self._pages_around(offset, size)
        try:
            native.fetch(self._pointer, first, end - first, milliseconds)
        finally:
            del memory

    def read(self, offset: int, size: int, timeout: float = 30.0) -> bytes:
        """Return a copy of bytes. Where bytes are lost, it raises, and touching them is a SIGBUS.

        Args:
            offset: bytes from the arena's start.
            size: bytes.
            timeout: seconds to wait for pages that are on other hosts.

        Raises:
            LostError, FetchTimeoutError, InvalidArgumentError, ClosedError, ForkedError: as
                `fetch` does.
        """
        self.fetch(offset, size, timeout)
        return bytes(memoryview(self._open()).cast("B")[offset : offset + size])

    def evict(
        self, offset: int = 0, size: int | None = None, timeout: float = 300.0
    ) -> EvictReport:
        """Let whole pages leave this host's memory: those that other hosts hold, and the rest to
        its disk. They come back when they are touched.

        Args:
            offset: bytes from the arena's start.
            size: bytes; default: up to the arena's end.
            timeout: seconds.

        Raises:
            EvictTimeoutError: it took longer; what was begun goes on.
            ServiceUnavailableError: the merger is away, or it may not evict: see its log.
            InvalidArgumentError, ClosedError, ForkedError, MigratedError: as they say.
        """
        milliseconds = milliseconds_of(timeout)
        memory = self._open()
        first, end = self._pages_around(offset, size)
        try:
            return native.evict(self._pointer, first, end - first, milliseconds)
        finally:
            del memory

    def unshare(self) -> None:
        """Make every page private again; later passes may merge them once more.

        Raises:
            OutOfMemoryError: there is no memory for the copies.
            LostError: done, but bytes are lost. Pages on other hosts come back first, and it waits
                for them.
            ClosedError, ForkedError: as they say.
        """
        memory = self._open()
        try:
            native.unshare(self._pointer)
        finally:
            del memory

    def close(self) -> None:
        """End the sharing: every page private, the name free. Views stay valid. Twice is fine.

        Raises:
            OutOfMemoryError: there is no memory for the copies; the arena stays open.
            LostError: it is closed, but bytes are lost.
            ForkedError: in a child of the process that made it.
        """
        refuse_fork(self._connection.pid)
        if self._memory is None:
            return
        # Without a view the memory ends here, and nothing needs to be copied back into it.
        remains = weakref.ref(self._memory)
        self._memory = None
        memory = remains()
        if memory is None or self._connection.closed:
            return
        try:
            native.close(self._pointer)
        except OutOfMemoryError:
            self._memory = memory
            raise

    def _check_range(self, offset: int, size: int) -> None:
        for number in (offset, size):
            if number < 0:
                raise InvalidArgumentError(f"{number} is no number of bytes")
        if offset > self._size or size > self._size - offset:
            raise InvalidArgumentError(
                f"{size} bytes at offset {offset} are not inside the arena's {self._size}"
            )

    def _pages_around(self, offset: int, size: int | None) -> tuple[int, int]:
        """Where the pages that hold a range begin and end, in bytes."""
        if size is None:
            size = max(self._size - offset, 0)
        self._check_range(offset, size)
        return offset // PAGE_SIZE * PAGE_SIZE, -(-(offset + size) // PAGE_SIZE) * PAGE_SIZE

    def _open(self) -> ctypes.Array[ctypes.c_ubyte]:
        """Return the memory; whoever holds it may use the pointer."""
        refuse_fork(self._connection.pid)
        memory = self._memory
        if memory is None or self._connection.closed:
            raise ClosedError(f"the arena {self._name!r} is closed")
        return memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<samepage.Arena {self._domain}/{self._name} {self._size} bytes{state}>"


def _own(
    connection: Connection, pointer: native.ArenaPointer, size: int
) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the arena's memory as an object whose end unmaps it.

    The finalizer holds the connection, so that sharing goes on while only views are left.
    """
    kind: type[ctypes.Array[ctypes.c_ubyte]] = type("_Memory", (ctypes.c_ubyte * size,), {})
    memory = kind.from_address(native.arena_data(pointer))
    finalizer = weakref.finalize(memory, _free, pointer, connection)
    finalizer.atexit = False
    return memory


def _free(pointer: native.ArenaPointer, connection: Connection) -> None:
    if os.getpid() == connection.pid:
        native.free(pointer)
