"""The arenas that this process holds for others, and how much it may hold.

All methods are called in the event loop. Bytes are copied in it, at most CHUNK_BYTES at a time;
calls of the client library that wait for a daemon or touch whole arenas run in threads: shares,
which may take minutes, in some of their own.

A view of an arena lives only as long as a copy, so that deleting an arena unmaps it at once. It is
the kernel that copies, by way of a file in memory: where an arena was migrated away, or its bytes
are lost, that is an error, and a touch of this process's own would be its end, and that of all
arenas in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

from samepage.arena import Arena
from samepage.client import DEFAULT_DOMAIN, Node
from samepage.errors import (
    InvalidArgumentError,
    LostError,
    NameTakenError,
    NotFoundError,
    SealedError,
    ServiceUnavailableError,
    ShareTimeoutError,
)
from samepage.reports import PAGE_SIZE, ArenaStats, CloneProgress, ShareReport
from samepage.sizes import format_size
from samepage_merger.holding.errors import LimitError, RangeError

CHUNK_BYTES = 1 << 20
SHARE_SECONDS = 30.0
SHARE_SECONDS_MAX = 600.0
# How many calls of each kind run at once; further ones wait.
_SHARES = 16
_CALLS = 8
_TRANSFERS = 8

Key = tuple[str, str]
Report = Callable[[CloneProgress], None]
Bring = Callable[[Report], Arena]
Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What is held at most: bytes of all arenas together, arenas, streams at once."""

    held_bytes: int
    arenas: int
    streams: int


class HeldArenas:
    """Arenas by domain and name.

    Args:
        node: the connection that they belong to; closed with them.
    """

    def __init__(self, node: Node, limits: Limits) -> None:
        self.limits = limits
        self.streams = 0
        self.node = node
        self._arenas: dict[Key, Arena] = {}
        # Those that are being made too, so that calls at the same time keep to the limits.
        self._sizes: dict[Key, int] = {}
        # Also those that are just being sealed: a write to them would be a fault.
        self._sealed: set[Arena] = set()
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._calls = ThreadPoolExecutor(_CALLS, "call")
        self._shares = ThreadPoolExecutor(_SHARES, "share")
        self._scratch = os.memfd_create("samepage-scratch", os.MFD_CLOEXEC)
        os.ftruncate(self._scratch, CHUNK_BYTES)
        self._transfers = ThreadPoolExecutor(_TRANSFERS, "transfer")

    @property
    def held_bytes(self) -> int:
        """Bytes of all arenas, those in the making included."""
        return sum(self._sizes.values())

    def arenas(self, domain: str = "") -> list[Arena]:
        """Return the arenas of a domain, or of all, by domain and name."""
        return [self._arenas[key] for key in sorted(self._arenas) if not domain or key[0] == domain]

    def find(self, domain: str, name: str) -> Arena:
        """Return an arena; an empty domain is the default one.

        Raises:
            NotFoundError: none is held under that name.
        """
        domain = domain or DEFAULT_DOMAIN
        try:
            return self._arenas[domain, name]
        except KeyError:
            raise NotFoundError(
                f"no arena {name!r} of the domain {domain!r} is held here"
            ) from None

    async def create(self, domain: str, name: str, size: int) -> Arena:
        """Make an arena of `size` bytes; a caller that is cancelled does not stop that.

        Raises:
            NameTakenError: it is held already, or another process of the host has it.
            LimitError: it would be too much.
            InvalidArgumentError, OutOfMemoryError, ServiceUnavailableError: as
                Node.create_arena().
        """
        key = (domain or DEFAULT_DOMAIN, name)
        self._check_free(key)
        rounded = -(-size // PAGE_SIZE) * PAGE_SIZE
        self._check_count()
        self._check_room(rounded)
        self._sizes[key] = rounded
        make = functools.partial(self.node.create_arena, name, size, key[0])
        return await self._to_the_end(self._keep(key, self._calls, make))

    async def bring(
        self, domain: str, name: str, work: Bring, told: Report, *, copy: bool
    ) -> Arena:
        """Have an arena of another host brought here.

        Args:
            work: makes the arena, in a thread, and reports on the way.
            told: gets the reports, in the event loop.
            copy: whether it may be dropped: when it is too much, or the caller was cancelled.

        Raises:
            NameTakenError, LimitError: as `create`.
            SamepageError: as Node.clone_arena() and Node.migrate_arena().
        """
        key = (domain or DEFAULT_DOMAIN, name)
        self._check_free(key)
        self._check_count()
        self._sizes[key] = 0
        loop = asyncio.get_running_loop()
        unwanted = False

        def report(progress: CloneProgress) -> None:
            if unwanted:
                raise ServiceUnavailableError("nobody waits for the copy any more")
            loop.call_soon_threadsafe(told, progress)

        coming = self._unfinished_task(self._keep(key, self._transfers, work, report))
        try:
            arena = await asyncio.shield(coming)
        except asyncio.CancelledError:
            if copy:
                unwanted = True
                coming.add_done_callback(self._drop)
            raise
        if copy and self.held_bytes > self.limits.held_bytes:
            await self.delete(arena)
            self._check_room(arena.size)
        return arena

    async def delete(self, arena: Arena) -> None:
        """End an arena; a caller that is cancelled does not stop that.

        Raises:
            OutOfMemoryError: a share() holds its memory, and there is none for the copies.
        """
        await self._to_the_end(self._delete(arena))

    def write(self, arena: Arena, offset: int, data: bytes) -> None:
        """Write at most CHUNK_BYTES bytes, all or none of them.

        Raises:
            InvalidArgumentError: they are more.
            RangeError: they would end beyond the arena.
            SealedError: it can only be read.
            ClosedError: it was deleted.
            MigratedError, LostError: its bytes are not here, and will not be.
        """
        if arena in self._sealed:
            raise SealedError(f"the arena {arena.name!r} is sealed: it can only be read")
        if len(data) > CHUNK_BYTES:
            raise InvalidArgumentError(
                f"a chunk of {len(data)} bytes is too large: send at most {CHUNK_BYTES} at once"
            )
        check_range(arena, offset, len(data))
        with arena.buffer as view:
            os.pwrite(self._scratch, data, 0)
            with _told(arena, offset, len(data)) as told:
                told(os.preadv(self._scratch, [view[offset : offset + len(data)]], 0))

    def read(self, arena: Arena, offset: int, length: int) -> bytes:
        """Return bytes that `find_range` has allowed, at most CHUNK_BYTES.

        Raises:
            ClosedError: it was deleted.
            MigratedError, LostError: its bytes are not here, and will not be.
        """
        size = min(length, CHUNK_BYTES)
        with arena.buffer as view, _told(arena, offset, size) as told:
            told(os.pwritev(self._scratch, [view[offset : offset + size]], 0))
        return os.pread(self._scratch, size, 0)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream that writes or reads, for as long as the context lasts.

        Raises:
            LimitError: there are too many.
        """
        if self.streams >= self.limits.streams:
            raise LimitError(f"{self.streams} streams write and read already: try again later")
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    async def share(self, arena: Arena, timeout: float) -> ShareReport:
        """Share an arena within `timeout` seconds.

        Raises:
            InvalidArgumentError: a timeout that is not above 0 and at most SHARE_SECONDS_MAX.
            ShareTimeoutError, ServiceUnavailableError, ClosedError: as Arena.share().
        """
        if not 0 < timeout <= SHARE_SECONDS_MAX:
            raise InvalidArgumentError(
                f"a timeout of {timeout:g} seconds: give more than 0, at most {SHARE_SECONDS_MAX:g}"
            )
        deadline = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                return await _in(self._shares, _share_until, arena, deadline)
        except TimeoutError as error:
            if isinstance(error, ShareTimeoutError):
                raise
            raise _late() from None

    async def unshare(self, arena: Arena) -> None:
        """Make every page private.

        Raises:
            OutOfMemoryError, ClosedError: as Arena.unshare().
        """
        await _in(self._calls, arena.unshare)

    async def discard(self, arena: Arena, offset: int, length: int) -> None:
        """Give back the memory of whole pages that `find_range` has allowed.

        Raises:
            InvalidArgumentError, OutOfMemoryError, ClosedError: as Arena.discard().
        """
        await _in(self._calls, arena.discard, offset, length)

    async def seal(self, arena: Arena) -> None:
        """Make an arena read-only for good; a caller that is cancelled does not stop that.

        Raises:
            PinnedError, OutOfMemoryError, ClosedError: as Arena.seal().
        """
        await self._to_the_end(self._seal(arena))

    def is_sealed(self, arena: Arena) -> bool:
        """Whether it can only be read."""
        return arena in self._sealed

    async def stats(self, arena: Arena) -> ArenaStats:
        """Count an arena's pages by state.

        Raises:
            ClosedError: it was deleted.
        """
        return await _in(self._calls, arena.stats)

    async def close(self) -> None:
        """End all arenas and the connection; no other call may run or follow."""
        if self._unfinished:
            await asyncio.wait(self._unfinished)
        # Ends the shares in flight, which no caller waits for any more.
        await asyncio.to_thread(self._end)
        self._calls.shutdown()
        self._transfers.shutdown()
        os.close(self._scratch)
        self._shares.shutdown(cancel_futures=True)

    def _end(self) -> None:
        # Arenas one by one, and before the node: what nobody views is unmapped, not copied back.
        while self._arenas:
            self._arenas.popitem()
        self.node.close()

    def _check_free(self, key: Key) -> None:
        if key in self._sizes:
            raise NameTakenError(f"an arena {key[1]!r} of the domain {key[0]!r} is held already")

    def _check_count(self) -> None:
        if len(self._sizes) >= self.limits.arenas:
            raise LimitError(f"{len(self._sizes)} arenas are held already: delete some")

    def _check_room(self, size: int) -> None:
        free = self.limits.held_bytes - self.held_bytes
        if size > free:
            raise LimitError(
                f"{format_size(size)} is more than the {format_size(max(free, 0))} left of "
                f"{format_size(self.limits.held_bytes)} that are held here: delete arenas, or "
                "raise hold_limit_bytes"
            )

    async def _keep(
        self,
        key: Key,
        pool: ThreadPoolExecutor,
        make: Callable[[*Arguments], Arena],
        *args: *Arguments,
    ) -> Arena:
        try:
            arena = await _in(pool, make, *args)
        except BaseException:
            del self._sizes[key]
            raise
        self._arenas[key] = arena
        if arena.sealed:
            self._sealed.add(arena)
        self._sizes[key] = self._sizes[key] or arena.size
        return arena

    async def _seal(self, arena: Arena) -> None:
        self._sealed.add(arena)
        try:
            await _in(self._calls, arena.seal)
        except BaseException:
            if not arena.sealed:
                self._sealed.discard(arena)
            raise

    async def _delete(self, arena: Arena) -> None:
        await _in(self._calls, arena.close)
        key = (arena.domain, arena.name)
        self._sealed.discard(arena)
        if self._arenas.get(key) is arena:
            del self._arenas[key], self._sizes[key]

    async def _to_the_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`, which goes on when the caller is cancelled."""
        return await asyncio.shield(self._unfinished_task(work))

    def _unfinished_task(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.ensure_future(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return task

    def _drop(self, coming: asyncio.Task[Arena]) -> None:
        """Delete a copy that nobody waits for any more."""
        if not coming.cancelled() and coming.exception() is None:
            self._unfinished_task(self._delete(coming.result()))


@contextlib.contextmanager
def _told(arena: Arena, offset: int, size: int) -> Iterator[Callable[[int], None]]:
    """See that the kernel copies all of so many bytes.

    Raises:
        MigratedError, LostError: their pages are not to be had.
    """

    def told(copied: int) -> None:
        if copied < size:
            raise OSError(errno.EFAULT, "not all was copied")

    try:
        yield told
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        arena.fetch(offset, size)
        raise LostError(f"bytes of the arena {arena.name!r} are lost") from None


def find_range(arena: Arena, offset: int, length: int) -> int:
    """Return how many bytes a call means by `length`, where 0 stands for all from `offset` on.

    Raises:
        RangeError: they would end beyond the arena.
    """
    check_range(arena, offset, length)
    return length or arena.size - offset


def check_range(arena: Arena, offset: int, length: int) -> None:
    """See that bytes are within an arena.

    Raises:
        RangeError: they would end beyond it.
    """
    if offset + length > arena.size:
        raise RangeError(
            f"bytes {offset} to {offset + length} end beyond the arena {arena.name!r} of "
            f"{arena.size} bytes"
        )


async def _in(
    pool: ThreadPoolExecutor, call: Callable[[*Arguments], Result], *args: *Arguments
) -> Result:
    return await asyncio.get_running_loop().run_in_executor(pool, call, *args)


def _share_until(arena: Arena, deadline: float) -> ShareReport:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _late()
    return arena.share(timeout=left)


def _late() -> ShareTimeoutError:
    return ShareTimeoutError("sharing was not done in time: what was begun goes on, ask again")
