"""One agent's part in a pass: its orders, one after the other, and how long it may take.

An agent is not trusted, nor waited for: it has a set time for each order and for all of a pass,
and one that is late is left out, from then on without any wait, until it has answered. Agents are
asked side by side, but two at a time, so that fingerprinting never takes a host's cores; one that
does not answer soon gives its place to the next.
"""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt
import structlog

from samepage.daemon import wire
from samepage.daemon.peers import Outcomes, PeerGoneError
from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Agent, Arena
from samepage_scanner.budget import Budget, NoBudget
from samepage_scanner.pages import Flags

WINDOW_BYTES = wire.FINGERPRINT_PAGES_MAX * (fp.FINGERPRINT_BYTES + 1)
# What one message carries.
RANGES_MAX = 4000
# An agent that owes an answer for so long is late: others do not wait for it.
LATE_SECONDS = 1.0

# An agent has its time once more for each so many pages.
_PACE_PAGES = 1 << 20

Ranges = npt.NDArray[np.int64]

log = structlog.get_logger(__name__)


class Turn:
    """Gives one agent its orders, inside `async with`, which waits for a place among those at work.

    Args:
        pages: what it has to look at, at most.
        answer_seconds: its time for an order, and for each 4 GiB of `pages`.
        budget: whose pace the orders keep.
    """

    def __init__(
        self,
        agent: Agent,
        pages: int,
        answer_seconds: float,
        places: asyncio.Semaphore,
        budget: Budget | NoBudget,
    ) -> None:
        self.agent = agent
        self._answer_seconds = answer_seconds
        self._left = answer_seconds * (1 + pages / _PACE_PAGES)
        self._places = places
        self._placed = False
        self._budget = budget
        self._asked = 0.0

    async def __aenter__(self) -> Turn:
        await self._take_place()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_place()

    @property
    def late(self) -> bool:
        """Whether it owes an answer for long."""
        return self.agent.silent and _now() - self._asked >= LATE_SECONDS

    async def fingerprint(self, arena: Arena, ranges: Ranges) -> tuple[fp.Fingerprints, Flags]:
        """Have ranges of pages looked at, all together at most FINGERPRINT_PAGES_MAX.

        Raises:
            TimeoutError: the agent is late, now or from before.
            PeerGoneError: it has gone, or was dropped.
            OrderRefusedError: it could not.
        """
        count = int(ranges[:, 1].sum())
        await self._order(wire.Type.FINGERPRINT, arena, ranges.astype("<u8").tobytes())
        window = self.agent.peer.window
        end = count * fp.FINGERPRINT_BYTES
        # The agent can change its window at any time: copy it, then look at it.
        fresh = np.frombuffer(window, "<u8", 2 * count).reshape(count, 2).copy()
        states = np.frombuffer(window, np.uint8, count, end).copy()
        if int(states.max()) > max(wire.PageState):
            raise self._drop("page states out of range")
        return fresh, states

    async def changed(self, arena: Arena, page: int, count: int) -> Ranges:
        """Which pages of a range were written since they were asked for last: firsts and counts.

        Raises:
            TimeoutError, PeerGoneError, OrderRefusedError: as `fingerprint`; writes that the
                agent has told of may be lost.
        """
        found = [np.empty((0, 2), np.int64)]
        while count:
            await self._order(wire.Type.CHANGED, arena, wire.PAGE_RANGE.pack(page, count))
            told, ranges = self._changed_answer(page, count)
            found.append(ranges)
            page, count = page + told, count - told
        return np.concatenate(found)

    def _changed_answer(self, page: int, count: int) -> tuple[int, Ranges]:
        window = self.agent.peer.window
        told, n = wire.CHANGED.unpack_from(window)
        if not 0 < told <= count or n > (WINDOW_BYTES - wire.CHANGED.size) // 16:
            raise self._drop("an answer to CHANGED that is none")
        packed = np.frombuffer(window, "<u8", 2 * n, wire.CHANGED.size).reshape(n, 2).copy()
        first, length = packed[:, 0], packed[:, 1]
        # Each bound before what relies on it: sums of 64 bits would overflow.
        inside = (first >= page) & (first < page + told) & (length > 0) & (length <= told)
        if not inside.all():
            raise self._drop("changed pages out of range")
        ranges: Ranges = packed.astype(np.int64)
        ends = ranges.sum(axis=1)
        if n and (ends[-1] > page + told or (ranges[1:, 0] < ends[:-1]).any()):
            raise self._drop("changed pages that overlap")
        return told, ranges

    async def _order(self, kind: wire.Type, arena: Arena, payload: bytes) -> None:
        if self.agent.silent:
            raise TimeoutError
        await self._budget.admit()
        if self.agent.peer.closed or arena.closed:
            raise PeerGoneError
        with self._budget.watch([self.agent]):
            order = asyncio.create_task(self.agent.peer.order(kind, arena.number, payload))
            order.add_done_callback(_retrieve)
            self.agent.order = order
            self._asked = _now()
            await self._answer(order)
        self._left -= _now() - self._asked
        order.result()

    async def _answer(self, order: asyncio.Task[Outcomes]) -> None:
        patience = min(self._answer_seconds, self._left)
        await asyncio.wait({order}, timeout=min(patience, LATE_SECONDS))
        if not order.done() and patience > LATE_SECONDS:
            self._give_place()
            await asyncio.wait({order}, timeout=patience - LATE_SECONDS)
            await self._take_place()
        if not order.done():
            log.warning("agent does not answer in time", pid=self.agent.peer.pid)
            raise TimeoutError

    async def _take_place(self) -> None:
        await self._places.acquire()
        self._placed = True

    def _give_place(self) -> None:
        if self._placed:
            self._placed = False
            self._places.release()

    def _drop(self, why: str) -> PeerGoneError:
        log.warning("agent dropped", pid=self.agent.peer.pid, why=why)
        self.agent.peer.close()
        return PeerGoneError()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _retrieve(order: asyncio.Task[Outcomes]) -> None:
    """Look at the error of an order that nobody waits for any more."""
    if not order.cancelled():
        order.exception()
