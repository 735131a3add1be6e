"""The client: arenas of memory whose identical pages are stored once on the host.

Lifetimes. An arena's memory belongs to a ctypes array (`_Memory`) that every view of it keeps
alive; when the last view is gone, a finalizer unmaps it. Closing an arena or its node only ends
the sharing, so a view never dangles. After fork() the child has neither memory nor connection:
every method raises ForkedError there, and the finalizers do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from samepage import native
from samepage.errors import ClosedError, ForkedError, InvalidArgumentError, OutOfMemoryError
from samepage.reports import (
    PAGE_SIZE,
    ArenaInfo,
    ArenaStats,
    CloneProgress,
    EvictReport,
    HostAccount,
    NodeStats,
    ShareReport,
)
from samepage.sizes import check_fits, parse_size

DEFAULT_DIRECTORY = "/run/samepage"
DEFAULT_DOMAIN = "default"
_TIMEOUT_MS_MAX = 2**31 - 1


def connect(dir: str | os.PathLike[str] | None = None) -> Node:
    """Connect to the samepage daemons of this host.

    Args:
        dir: their socket directory; default: $SAMEPAGE_DIR, else /run/samepage.

    Raises:
        NotRunningError: no merger answers there.
        ServiceUnavailableError: it accepts and then does not answer.
        ProtocolVersionError: it speaks another version of the protocol.
    """
    return Node(dir)


class _Connection:
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


class Node:
    """A connection to the daemons of this host; made by `connect()`, a context manager."""

    def __init__(self, dir: str | os.PathLike[str] | None = None) -> None:
        chosen = dir if dir is not None else os.environ.get("SAMEPAGE_DIR")
        self._directory = os.fspath(chosen or DEFAULT_DIRECTORY)
        self._connection = _Connection(self._directory)

    @property
    def dir(self) -> str:
        """The daemons' socket directory."""
        return self._directory

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._connection.closed

    def create_arena(self, name: str, size: int | str, domain: str | None = None) -> Arena:
        """Make an arena: private memory, all zero, that this process reads and writes freely.

        Args:
            name: 1 to 127 bytes of UTF-8 without "/" or control characters, unique in its domain
                on this host.
            size: bytes, or text such as "512MiB"; rounded up to whole pages of 4096 bytes.
            domain: who may share with it: 1 to 63 characters of [a-z0-9], "-" and "."; default
                this process's own, which the daemons know, or else "default". Nothing is shared
                across domains.

        Raises:
            InvalidArgumentError: a bad name, domain or size.
            NameTakenError: an arena of the domain on this host has the name.
            PermissionDeniedError: this process may not use the domain, or any.
            OutOfMemoryError: more than the machine or the address space has.
            ServiceUnavailableError: the merger is away.
            ClosedError, ForkedError: as they say.
        """
        count = parse_size(size)
        check_fits(count)
        _refuse_fork(self._connection.pid)
        with self._connection.used() as node:
            pointer = native.create_arena(node, name, domain, count)
        return Arena(self._connection, pointer, name)

    def clone_arena(
        self,
        source: str,
        name: str | None = None,
        domain: str | None = None,
        lazy: bool = False,
        timeout: float = 300.0,
        progress: Callable[[CloneProgress], object] | None = None,
    ) -> Arena:
        """Make an arena that is a copy of one on another host. Only what this host lacks is moved.

        Args:
            source: "HOST/ARENA", by their names in the cluster and on that host.
            name: the new arena's; default: the source's.
            domain: of both; default: this process's own, as for `create_arena`.
            lazy: return at once; pages come when they are touched, and in the background.
            timeout: seconds. A clone that takes longer leaves nothing behind.
            progress: called with how far it is, as it goes on, in this thread. What it raises is
                printed and ignored.

        Raises:
            NotFoundError: no such host, or no such arena there.
            CloneTimeoutError: it took longer.
            ServiceUnavailableError: the merger or the other host is away.
            UnsupportedKernelError: the kernel or the merger lacks what it takes.
            InvalidArgumentError, NameTakenError, OutOfMemoryError: as `create_arena` does.
            ClosedError, ForkedError: as they say.
        """
        flags = native.CLONE_LAZY if lazy else 0
        return self._clone(source, name, domain, flags, 0.0, timeout, progress)

    def migrate_arena(
        self,
        source: str,
        name: str | None = None,
        domain: str | None = None,
        max_freeze: float = 0.5,
        timeout: float = 300.0,
        progress: Callable[[CloneProgress], object] | None = None,
    ) -> Arena:
        """Move an arena here from another host: its process there has it no more.

        Args:
            source, name, domain, progress: as for `clone_arena`.
            max_freeze: seconds for which its writers may have to wait at the end.
            timeout: seconds until the arena is being made here; from then on it is not given up.

        Raises:
            CloneTimeoutError: it took longer, or the writers would have had to wait for longer: the
                arena stayed where it was.
            PinnedError: pages of the source are pinned for I/O.
            NotFoundError and others: as `clone_arena` does.
        """
        return self._clone(
            source, name, domain, native.CLONE_MIGRATE, max_freeze, timeout, progress
        )

    def _clone(
        self,
        source: str,
        name: str | None,
        domain: str | None,
        flags: int,
        max_freeze: float,
        timeout: float,
        progress: Callable[[CloneProgress], object] | None,
    ) -> Arena:
        host, slash, arena = source.partition("/")
        if not (host and slash and arena):
            raise InvalidArgumentError(f"{source!r} is no source: give HOST/ARENA")
        milliseconds = _milliseconds(timeout)
        freeze = _milliseconds(max_freeze) if flags & native.CLONE_MIGRATE else 0
        options = native.CloneOptions(host, arena, name, domain, flags, freeze)
        _refuse_fork(self._connection.pid)
        with self._connection.used() as node:
            pointer = native.clone_arena(node, options, milliseconds, progress)
        return Arena(self._connection, pointer, name or arena)

    def arenas(self) -> list[ArenaInfo]:
        """Return the arenas of this host, of all processes, ordered by domain and name.

        For operators: root, and the user that runs the daemons.

        Raises:
            NotRunningError: no merger, or this user is no operator.
            ServiceUnavailableError: the merger is away.
            ClosedError, ForkedError: as they say.
        """
        from samepage import host  # here: gRPC takes a while to import

        self._check_usable()
        return host.list_arenas(self._directory)

    def stats(self) -> NodeStats:
        """Return what the merger of this host holds and has done; for operators, as arenas().

        Raises:
            NotRunningError, ServiceUnavailableError, ClosedError, ForkedError: as arenas().
        """
        from samepage import host

        self._check_usable()
        return host.node_stats(self._directory)

    def account(self) -> HostAccount:
        """Return whose memory it is, by arena, process, domain and host; for operators, as
        arenas().

        Raises:
            NotRunningError, ServiceUnavailableError, ClosedError, ForkedError: as arenas().
            ProtocolVersionError: the merger is too old for accounts.
        """
        from samepage import host

        self._check_usable()
        return host.host_account(self._directory)

    def close(self) -> None:
        """End the connection and the sharing of its arenas. Views stay valid. Twice is fine.

        Raises:
            ForkedError: in a child of the process that connected.
        """
        _refuse_fork(self._connection.pid)
        self._connection.close()

    def _check_usable(self) -> None:
        _refuse_fork(self._connection.pid)
        if self.closed:
            raise ClosedError("the node is closed: connect() again")

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
        return f"<samepage.Node {self._directory!r}{' closed' if self.closed else ''}>"


class Arena:
    """A region of this process's memory that may be shared; made by `Node.create_arena()`.

    A context manager: leaving it closes the arena. Methods may be called from any thread.
    """

    def __init__(self, connection: _Connection, pointer: native.ArenaPointer, name: str) -> None:
        self._connection = connection
        self._pointer = pointer
        self._name = name
        self._domain = native.arena_domain(pointer)
        self._size = native.arena_size(pointer)
        self._sealed = False
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
        milliseconds = _milliseconds(timeout)
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
        milliseconds = _milliseconds(timeout)
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
        milliseconds = _milliseconds(timeout)
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
        _refuse_fork(self._connection.pid)
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
        _refuse_fork(self._connection.pid)
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
    connection: _Connection, pointer: native.ArenaPointer, size: int
) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the arena's memory as an object whose end unmaps it.

    The finalizer holds the connection, so that sharing goes on while only views are left.
    """
    kind: type[ctypes.Array[ctypes.c_ubyte]] = type("_Memory", (ctypes.c_ubyte * size,), {})
    memory = kind.from_address(native.arena_data(pointer))
    finalizer = weakref.finalize(memory, _free, pointer, connection)
    finalizer.atexit = False
    return memory


def _free(pointer: native.ArenaPointer, connection: _Connection) -> None:
    if os.getpid() == connection.pid:
        native.free(pointer)


def _disconnect(pointer: native.NodePointer, pid: int) -> None:
    if os.getpid() == pid:
        native.disconnect(pointer)


def _refuse_fork(pid: int) -> None:
    if os.getpid() != pid:
        raise ForkedError(
            f"process {os.getpid()} was forked from {pid}, and arenas are not inherited: "
            "connect() anew"
        )


def _milliseconds(timeout: float) -> int:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise InvalidArgumentError(f"the timeout {timeout!r} is no number of seconds")
    if not math.isfinite(timeout) or timeout <= 0:
        raise InvalidArgumentError(f"a timeout of {timeout!r} seconds is not positive and finite")
    return min(math.ceil(timeout * 1000), _TIMEOUT_MS_MAX)
