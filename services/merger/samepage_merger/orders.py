"""Orders to agents, as arrays of pages; what became of each page comes back.

Nothing here raises for what an agent does: an agent that is gone, late or unwilling is an outcome
like any other. Outcomes are applied to the books by the receiver, in the order of the agent's
messages, whether or not anybody still waits for them.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage.daemon.peers import Apply, OrderRefusedError, Outcomes, PeerGoneError
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena, State
from samepage_merger.cluster.away import Bytes, Digests
from samepage_merger.runs import Int64s, is_run, join, join_extents
from samepage_merger.sharers import FULL, fits

#: Outcome of a page whose arena is gone, or of another domain.
GONE = len(Outcome)
#: Outcome of a page whose merge might not be undone within the host's memory.
NO_HEADROOM = GONE + 1
#: Outcome of a page that was shared, and restored since longer runs need its arena's mappings.
DISPLACED = NO_HEADROOM + 1

_EXTENTS_MAX = (wire.MESSAGE_MAX - wire.HEADER.size - wire.REPLACE.size) // wire.EXTENT.itemsize
_RESTORES_IN_FLIGHT = 64
_RESTORE_PAGES = 4096

#: Gets a part of what was read: where in the pages asked for it begins, what became of each, and
#: their bytes, which are another's when it returns.
Keep = Callable[[int, Outcomes, memoryview], None]


class _FailedError(Exception):
    """The order has no outcomes; `args` are the outcome of all its pages, and the agent's errno if
    it gave one."""


class Orders:
    """Sends orders.

    Args:
        timeout: seconds that an agent has for an answer. One that is late is not asked again
            until it has answered what it was asked before.
        sharers_max: how many pages may map a slot, as it is now; 0: any number.
    """

    def __init__(self, timeout: float, sharers_max: Callable[[], int] = lambda: 0) -> None:
        self._timeout = timeout
        self.sharers_max = sharers_max

    async def read(self, arena: Arena, pages: Int64s, keep: Keep) -> Outcomes:
        """Have pages (ascending, each once) read; `keep` gets their bytes, part by part.

        Rows of pages with another outcome than MERGED mean nothing. What `keep` raises, this does.
        """
        outcomes = np.full(pages.size, GONE, np.uint8)
        session = arena.session
        if session is None:
            return outcomes
        async with session.reading:
            for low, high in _read_parts(pages):
                payload = _ranges(pages[low:high])
                try:
                    read = await self._send(arena, wire.Type.READ, payload, high - low)
                except _FailedError as failed:
                    outcomes[low:] = failed.args[0]
                    break
                outcomes[low:high] = read
                keep(low, read, memoryview(session.peer.window)[: (high - low) * wire.PAGE_SIZE])
        return outcomes

    async def replace(self, arena: Arena, pages: Int64s, slots: Int64s, flags: int = 0) -> Outcomes:
        """Let pages (ascending, each once) map slots; slot 0 is the zero page.

        A slot that was freed between the caller's look at the books and now makes its page BUSY,
        one that has all the sharers it may have makes it FULL.

        Args:
            flags: of the order (wire.REPLACE_ABSENT).
        """
        if arena.state is not State.OPEN:
            return np.full(pages.size, GONE, np.uint8)
        alive = (slots == wire.ZERO_SLOT) | arena.domain.books.table.contains(slots)
        if alive.all():
            return await self._replace_alive(arena, pages, slots, flags)
        outcomes = np.full(pages.size, Outcome.BUSY, np.uint8)
        outcomes[alive] = await self._replace_alive(arena, pages[alive], slots[alive], flags)
        return outcomes

    async def _replace_alive(
        self, arena: Arena, pages: Int64s, slots: Int64s, flags: int
    ) -> Outcomes:
        parts = list(_parts(pages, slots))
        if len(parts) == 1:
            return await self._replace_part(arena, pages, slots, parts[0].extents, flags)
        books = arena.domain.books
        guard = books.hold(slots)
        try:
            outcomes = [
                await self._replace_part(
                    arena,
                    pages[part.low : part.high],
                    slots[part.low : part.high],
                    part.extents,
                    flags,
                )
                for part in parts
            ]
        finally:
            arena.domain.free(books.release(guard))
        return np.concatenate(outcomes) if outcomes else np.empty(0, np.uint8)

    async def away(self, arena: Arena, pages: Int64s, digests: Digests) -> Outcomes:
        """Let absent pages (ascending, each once) be away; MERGED where they are."""
        outcomes = np.full(pages.size, GONE, np.uint8)
        for low in range(0, pages.size, wire.AWAY_PAGES_MAX):
            part = slice(low, low + wire.AWAY_PAGES_MAX)
            outcomes[part] = await self._away_part(arena, pages[part], digests[part])
        return outcomes

    async def evict(self, arena: Arena, pages: Int64s, data: Bytes, digests: Digests) -> Outcomes:
        """Let at most EVICT_PAGES_MAX pages (ascending, each once) that still hold these bytes go
        away; MERGED where they did. Their digests are pinned until that is known."""
        return await self._send_data(arena, wire.Type.EVICT, pages, data, digests)

    async def fill(self, arena: Arena, pages: Int64s, data: Bytes) -> Outcomes:
        """Give at most READ_PAGES_MAX away pages (ascending, each once) their bytes; BUSY where one
        was not away, the agent did not answer, or nobody may write the arena now."""
        if arena.frozen_until > time.monotonic():
            return np.full(pages.size, Outcome.BUSY, np.uint8)
        return await self._send_data(arena, wire.Type.FILL, pages, data)

    async def poison(self, arena: Arena, pages: Int64s) -> Outcomes:
        """Let whoever touches these away pages (ascending, each once) get an error."""
        return await self._send_data(arena, wire.Type.POISON, pages, b"")

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

    async def freeze(self, arena: Arena, milliseconds: int) -> int:
        """Stop the writers of an arena for so long at most, 0 to let them go on; MERGED when the
        agent did it."""
        session = arena.session
        if session is None:
            return GONE
        if session.peer.version < wire.SINCE[wire.Type.FREEZE]:
            return Outcome.UNSUPPORTED
        try:
            await self._send(arena, wire.Type.FREEZE, wire.FREEZE.pack(milliseconds), 0)
        except _FailedError as failed:
            outcome: int = failed.args[0]
            return outcome
        return Outcome.MERGED

    async def leave(self, arena: Arena, snapshot: bytes) -> bool | None:
        """Leave a frozen arena to another host; False where it was not frozen any more, and stays,
        None where the agent did not say."""
        session = arena.session
        if session is None or arena.leaving is session:
            return None
        arena.leaving = session

        def apply(outcomes: Outcomes) -> None:
            arena.leaving = None
            arena.domain.leave(arena, snapshot)

        def undone() -> None:
            arena.leaving = None

        try:
            await self._send(arena, wire.Type.LEAVE, snapshot, 0, apply=apply, undone=undone)
        except _FailedError as failed:
            return False if errno.EBUSY in failed.args[1:] else None
        return True

    async def count_absent(self, arena: Arena) -> int | None:
        """Ask how many pages take no memory; None when the agent does not say."""
        session = arena.session
        if session is None:
            return None
        async with session.reading:
            try:
                await self._send(arena, wire.Type.COUNT, b"", 0)
            except _FailedError:
                return None
            return int.from_bytes(session.peer.window[: wire.COUNTED_BYTES], "little")

    async def _send_data(
        self,
        arena: Arena,
        kind: wire.Type,
        pages: Int64s,
        data: Bytes,
        digests: Digests | None = None,
    ) -> Outcomes:
        """Send an order of version 3: EVICT, with digests, or one that ends pages' being away."""
        session = arena.session
        if session is None or not pages.size:
            return np.full(pages.size, GONE, np.uint8)
        if session.peer.version < wire.SINCE[kind]:
            return np.full(pages.size, Outcome.UNSUPPORTED, np.uint8)
        async with session.reading:
            payload = _ranges(pages)
            apply: Apply = functools.partial(_no_longer_away, arena, pages)
            undone = None
            if digests is not None:
                payload += digests.tobytes()
                apply, undone = _pinned(arena, pages, digests)
            try:
                return await self._send(
                    arena, kind, payload, pages.size, data=data, apply=apply, undone=undone
                )
            except _FailedError as failed:
                return np.full(pages.size, failed.args[0], np.uint8)

    async def _away_part(self, arena: Arena, pages: Int64s, digests: Digests) -> Outcomes:
        records = np.empty(pages.size, wire.AWAY)
        records["page"] = pages
        records["digest"] = np.ascontiguousarray(digests).view("V32").reshape(-1)
        apply, undone = _pinned(arena, pages, digests)
        try:
            return await self._send(
                arena, wire.Type.AWAY, records.tobytes(), pages.size, apply=apply, undone=undone
            )
        except _FailedError as failed:
            return np.full(pages.size, failed.args[0], np.uint8)

    async def _replace_part(
        self, arena: Arena, pages: Int64s, slots: Int64s, extents: npt.NDArray[np.void], flags: int
    ) -> Outcomes:
        if arena.state is not State.OPEN:
            return np.full(pages.size, GONE, np.uint8)
        if cap := self.sharers_max():
            fit = fits(arena.domain, slots, cap)
            if not fit.all():
                outcomes = np.full(pages.size, FULL, np.uint8)
                outcomes[fit] = await self._replace_alive(arena, pages[fit], slots[fit], flags)
                return outcomes
        payload = wire.REPLACE.pack(extents.size, flags) + extents.tobytes()
        domain = arena.domain
        release = functools.partial(domain.release, arena, domain.hold(arena, slots))

        def apply(outcomes: Outcomes) -> None:
            domain.replaced(arena, pages, slots, outcomes)
            release()

        try:
            return await self._send(
                arena, wire.Type.REPLACE, payload, pages.size, apply=apply, undone=release
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
        data: Bytes = b"",
        apply: Apply | None = None,
        undone: Callable[[], None] | None = None,
    ) -> Outcomes:
        """Send an order and wait for its outcomes.

        Args:
            data: what the agent shall find in the window, which the caller holds. Nobody writes
                there before this is answered: an order that nobody waits for counts as overdue.
            undone: called when the agent has not done it, and will not. When the connection ends
                first nobody knows: then neither this nor `apply` is.

        Raises:
            _FailedError: there are none.
        """
        session = arena.session
        if session is None or arena.state is not State.OPEN:
            _call(undone)
            raise _FailedError(GONE)
        if session.overdue:
            _call(undone)
            raise _FailedError(Outcome.BUSY)

        def answered(answer: asyncio.Future[Outcomes]) -> None:
            if isinstance(answer.exception(), OrderRefusedError):
                _call(undone)

        session.peer.window[: len(data)] = data
        try:
            answer = session.peer.give(kind, arena.number, payload, outcomes=outcomes, apply=apply)
        except PeerGoneError as error:
            _call(undone)
            raise _FailedError(GONE) from error
        answer.add_done_callback(answered)
        try:
            await asyncio.wait({answer}, timeout=self._timeout)
        finally:
            if not answer.done():
                session.overdue += 1
                answer.add_done_callback(lambda _: session.caught_up())
        if not answer.done():
            raise _FailedError(Outcome.BUSY)
        try:
            return answer.result()
        except PeerGoneError as error:
            raise _FailedError(GONE) from error
        except OrderRefusedError as error:
            outcome = _OUTCOME_OF_ERRNO.get(error.args[0], Outcome.BUSY)
            raise _FailedError(outcome, error.args[0]) from error


_OUTCOME_OF_ERRNO = {
    errno.ENOENT: GONE,
    errno.EBADF: GONE,
    errno.ENOSYS: Outcome.UNSUPPORTED,
    errno.EOPNOTSUPP: Outcome.UNSUPPORTED,
}


def _call(undone: Callable[[], None] | None) -> None:
    if undone is not None:
        undone()


def _no_longer_away(arena: Arena, pages: Int64s, outcomes: Outcomes) -> None:
    arena.domain.no_longer_away(arena, pages, outcomes)


def _pinned(arena: Arena, pages: Int64s, digests: Digests) -> tuple[Apply, Callable[[], None]]:
    """Pin the digests of an order to let pages go; return what to call with its outcomes, and what
    to call when it comes to nothing."""
    domain = arena.domain
    unpin = functools.partial(domain.unpin, arena, domain.pin(arena, digests))

    def apply(outcomes: Outcomes) -> None:
        domain.evicted(arena, pages, digests, outcomes)
        unpin()

    return apply, unpin


def _ranges(pages: Int64s) -> bytes:
    """Return ascending pages as ranges, as READ has them."""
    if is_run(pages):
        return wire.PAGE_RANGE.pack(int(pages[0]), pages.size)
    return np.stack(join(pages), axis=1).astype("<u8").tobytes()


def _read_parts(pages: Int64s) -> Iterator[tuple[int, int]]:
    """Cut pages into parts that each fit into one READ."""
    for low in range(0, pages.size, wire.READ_PAGES_MAX):
        yield low, min(low + wire.READ_PAGES_MAX, pages.size)


@dataclass(frozen=True, slots=True)
class _Part:
    """What fits into one REPLACE: pages [low, high) of an order, and what they shall map."""

    low: int
    high: int
    extents: npt.NDArray[np.void]


def _parts(pages: Int64s, slots: Int64s) -> Iterator[_Part]:
    low = 0
    while low < pages.size:
        high = min(pages.size, low + wire.REPLACE_PAGES_MAX)
        extents = join_extents(pages[low:high], slots[low:high])[:_EXTENTS_MAX]
        if extents.size == _EXTENTS_MAX:
            high = low + int(extents["count"].sum())
        yield _Part(low, high, extents)
        low = high
