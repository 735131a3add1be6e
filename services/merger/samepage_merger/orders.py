"""Orders to agents, as arrays of pages; what became of each page comes back.

Nothing here raises for what an agent does: an agent that is gone, late or unwilling is an outcome
like any other. Outcomes are applied to the books by the receiver, in the order of the agent's
messages, whether or not anybody still waits for them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage.daemon.peers import Apply, OrderRefusedError, Outcomes, PeerGoneError
from samepage.daemon.wire import Outcome
from samepage_merger.domains import Arena, State
from samepage_merger.runs import Int64s, join, join_extents

#: Outcome of a page whose arena is gone, or of another domain.
GONE = len(Outcome)

_EXTENTS_MAX = (wire.MESSAGE_MAX - wire.HEADER.size - wire.REPLACE.size) // wire.EXTENT.itemsize
_RESTORES_IN_FLIGHT = 64
_RESTORE_PAGES = 4096

Bytes = npt.NDArray[np.uint8]


class _FailedError(Exception):
    """The order has no outcomes; `args[0]` is the outcome of all its pages."""


class Orders:
    """Sends orders.

    Args:
        timeout: seconds that an agent has for an answer. One that is late is not asked again
            until it has answered what it was asked before.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._in_flight: set[asyncio.Task[Outcomes]] = set()

    async def read(self, arena: Arena, pages: Int64s, into: Bytes) -> Outcomes:
        """Copy pages (ascending, each once) into the first rows of an array of pages.

        Rows of pages with another outcome than MERGED mean nothing.
        """
        outcomes = np.full(pages.size, GONE, np.uint8)
        for low, high in _spans(pages, wire.READ_PAGES_MAX):
            try:
                read = await self._read_span(arena, pages[low:high], into[low:high])
            except _FailedError as failed:
                outcomes[low:] = failed.args[0]
                break
            outcomes[low:high] = read
        return outcomes

    async def replace(self, arena: Arena, pages: Int64s, slots: Int64s) -> Outcomes:
        """Let pages (ascending, each once) map slots; slot 0 is the zero page.

        A slot that was freed between the caller's look at the books and now makes its page BUSY.
        """
        if arena.state is not State.OPEN:
            return np.full(pages.size, GONE, np.uint8)
        alive = (slots == wire.ZERO_SLOT) | arena.domain.books.table.contains(slots)
        if alive.all():
            return await self._replace_alive(arena, pages, slots)
        outcomes = np.full(pages.size, Outcome.BUSY, np.uint8)
        outcomes[alive] = await self._replace_alive(arena, pages[alive], slots[alive])
        return outcomes

    async def _replace_alive(self, arena: Arena, pages: Int64s, slots: Int64s) -> Outcomes:
        books = arena.domain.books
        guard = books.hold(slots)
        try:
            parts = [
                await self._replace_part(arena, pages[low:high], slots[low:high])
                for low, high in _parts(pages, slots)
            ]
        finally:
            arena.domain.free(books.release(guard))
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    async def restore(self, arena: Arena, pages: Int64s) -> Outcomes:
        """Let pages (ascending, each once) be private again; MERGED where the agent did it."""
        first, count = join(pages)
        cuts = [
            (start, min(_RESTORE_PAGES, end - start))
            for begin, end in zip(first.tolist(), (first + count).tolist(), strict=True)
            for start in range(begin, end, _RESTORE_PAGES)
        ]
        outcomes: list[Outcomes] = [np.empty(0, np.uint8)]
        for low in range(0, len(cuts), _RESTORES_IN_FLIGHT):
            some = cuts[low : low + _RESTORES_IN_FLIGHT]
            outcomes += await asyncio.gather(
                *(self._restore_range(arena, start, size) for start, size in some)
            )
        return np.concatenate(outcomes)

    async def count_absent(self, arena: Arena) -> int | None:
        """Ask how many pages take no memory; None when the agent does not say."""
        session = arena.session
        if session is None or session.peer.version < wire.SINCE[wire.Type.COUNT]:
            return None
        async with session.reading:
            try:
                await self._send(arena, wire.Type.COUNT, b"", 0)
            except _FailedError:
                return None
            return int.from_bytes(session.peer.window[: wire.COUNTED_BYTES], "little")

    async def _read_span(self, arena: Arena, pages: Int64s, into: Bytes) -> Outcomes:
        session = arena.session
        if session is None:
            raise _FailedError(GONE)
        first = int(pages[0])
        count = int(pages[-1]) - first + 1
        async with session.reading:
            payload = wire.PAGE_RANGE.pack(first, count)
            outcomes = await self._send(arena, wire.Type.READ, payload, count)
            window = np.frombuffer(session.peer.window, np.uint8).reshape(-1, wire.PAGE_SIZE)
            if count == pages.size:
                into[:] = window[:count]
            else:
                np.take(window, pages - first, axis=0, out=into, mode="clip")
        return outcomes[pages - first]

    async def _replace_part(self, arena: Arena, pages: Int64s, slots: Int64s) -> Outcomes:
        if arena.state is not State.OPEN:
            return np.full(pages.size, GONE, np.uint8)
        extents = join_extents(pages, slots)
        payload = wire.REPLACE.pack(extents.size, 0) + extents.tobytes()
        domain = arena.domain
        hold = domain.hold(arena, slots)

        def apply(outcomes: Outcomes) -> None:
            domain.replaced(arena, pages, slots, outcomes)
            domain.release(arena, hold)

        try:
            return await self._send(
                arena, wire.Type.REPLACE, payload, pages.size, apply=apply, hold=hold
            )
        except _FailedError as failed:
            return np.full(pages.size, failed.args[0], np.uint8)

    async def _restore_range(self, arena: Arena, page: int, count: int) -> Outcomes:
        try:
            await self._send(arena, wire.Type.RESTORE, wire.PAGE_RANGE.pack(page, count), 0)
        except _FailedError as failed:
            return np.full(count, failed.args[0], np.uint8)
        return np.zeros(count, np.uint8)

    async def _send(
        self,
        arena: Arena,
        kind: wire.Type,
        payload: bytes,
        outcomes: int,
        *,
        apply: Apply | None = None,
        hold: int | None = None,
    ) -> Outcomes:
        """Send an order and wait for its outcomes; the hold ends with its answer.

        Raises:
            _FailedError: there are none.
        """
        session = arena.session
        if session is None or arena.state is not State.OPEN:
            raise _FailedError(GONE)
        if session.overdue:
            if hold is not None:
                arena.domain.release(arena, hold)
            raise _FailedError(Outcome.BUSY)

        def answered(task: asyncio.Task[Outcomes]) -> None:
            self._in_flight.discard(task)
            if task.cancelled():
                return
            if hold is not None and isinstance(task.exception(), OrderRefusedError):
                arena.domain.release(arena, hold)

        order = session.peer.order(kind, arena.number, payload, outcomes=outcomes, apply=apply)
        task = asyncio.ensure_future(order)
        self._in_flight.add(task)
        task.add_done_callback(answered)
        await asyncio.wait({task}, timeout=self._timeout)
        if not task.done():
            session.overdue += 1
            task.add_done_callback(lambda _: session.caught_up())
            raise _FailedError(Outcome.BUSY)
        try:
            return task.result()
        except PeerGoneError as error:
            raise _FailedError(GONE) from error
        except OrderRefusedError as error:
            raise _FailedError(_OUTCOME_OF_ERRNO.get(error.args[0], Outcome.BUSY)) from error


_OUTCOME_OF_ERRNO = {
    errno.ENOENT: GONE,
    errno.EBADF: GONE,
    errno.ENOSYS: Outcome.UNSUPPORTED,
    errno.EOPNOTSUPP: Outcome.UNSUPPORTED,
}


def _spans(pages: Int64s, size: int) -> Iterator[tuple[int, int]]:
    """Cut ascending pages into parts that each lie within `size` pages."""
    low = 0
    while low < pages.size:
        high = int(np.searchsorted(pages, pages[low] + size))
        yield low, high
        low = high


def _parts(pages: Int64s, slots: Int64s) -> Iterator[tuple[int, int]]:
    """Cut pages into parts that each fit into one REPLACE."""
    low = 0
    while low < pages.size:
        high = min(pages.size, low + wire.REPLACE_PAGES_MAX)
        counts = join_extents(pages[low:high], slots[low:high])["count"]
        if counts.size > _EXTENTS_MAX:
            high = low + int(counts[:_EXTENTS_MAX].sum())
        yield low, high
        low = high
