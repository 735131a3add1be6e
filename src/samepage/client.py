"""The client: arenas of memory whose identical pages are stored once on the host.

Lifetimes. An arena's memory belongs to a ctypes array (arena.py) that every view of it keeps alive;
when the last view is gone, a finalizer unmaps it. Closing an arena or its node only ends the
sharing, so a view never dangles. After fork() the child has neither memory nor connection: every
method raises ForkedError there, and the finalizers do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from samepage import native
from samepage.arena import Arena
from samepage.connection import Connection, milliseconds_of, refuse_fork
from samepage.errors import ClosedError, InvalidArgumentError
from samepage.reports import ArenaInfo, CloneProgress, HostAccount, NodeStats
from samepage.sizes import check_fits, parse_size

DEFAULT_DIRECTORY = "/run/samepage"
DEFAULT_DOMAIN = "default"


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


class Node:
    """A connection to the daemons of this host; made by `connect()`, a context manager."""

    def __init__(self, dir: str | os.PathLike[str] | None = None) -> None:
        chosen = dir if dir is not None else os.environ.get("SAMEPAGE_DIR")
        self._directory = os.fspath(chosen or DEFAULT_DIRECTORY)
        self._connection = Connection(self._directory)

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
        refuse_fork(self._connection.pid)
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
        A copy of a sealed arena is sealed.

        Args:
            source: "HOST/ARENA", by their names in the cluster and on that host.
            name: the new arena's; default: the source's.
            domain: of both; default: this process's own, as for `create_arena`.
            lazy: return at once; pages come when they are touched, and in the background.
            timeout: seconds. A clone that takes longer leaves nothing behind.
            progress: called with how far it is, as it goes on, in this thread. What it raises, as
                Ctrl-C does, ends the clone, of which nothing is left, and is raised.

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
            timeout: seconds until the arena is being made here; from then on it is not given up,
                and what `progress` raises, or Ctrl-C, is ignored.

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
        milliseconds = milliseconds_of(timeout)
        freeze = milliseconds_of(max_freeze) if flags & native.CLONE_MIGRATE else 0
        options = native.CloneOptions(host, arena, name, domain, flags, freeze)
        refuse_fork(self._connection.pid)
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
        refuse_fork(self._connection.pid)
        self._connection.close()

    def _check_usable(self) -> None:
        refuse_fork(self._connection.pid)
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
