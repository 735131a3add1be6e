"""Asks agents what their pages look like, and notes it in the books.

An agent is not trusted, nor waited for: it has a set time for each order and for all of a pass,
and one that is late is left out, from then on without any wait, until it has answered. Agents are
asked side by side, but two at a time, so that fingerprinting never takes a host's cores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from samepage.daemon import wire
from samepage.daemon.peers import OrderRefusedError, Outcomes, PeerGoneError
from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Agent, Arena, Books
from samepage_scanner.pages import Flags

WINDOW_BYTES = wire.FINGERPRINT_PAGES_MAX * (fp.FINGERPRINT_BYTES + 1)

_AGENTS_AT_ONCE = 2
# An agent has its time once more for each so many pages.
_PACE_PAGES = 1 << 20

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Look:
    """What came of looking at some arenas.

    Attributes:
        seen: the arenas that were looked at from end to end.
        written: pages with another fingerprint than before.
        agent_seconds: how long agents that answered took, added up.
    """

    seen: set[Arena] = field(default_factory=set)
    written: int = 0
    agent_seconds: float = 0.0


class Looker:
    """Looks at arenas.

    Args:
        answer_seconds: an agent's time for an order, and for each 4 GiB of a pass.
    """

    def __init__(self, books: Books, answer_seconds: float) -> None:
        self._books = books
        self._answer_seconds = answer_seconds

    async def look(self, arenas: Sequence[Arena], interrupted: Callable[[], bool]) -> Look:
        """Look at all pages of these arenas, or until `interrupted` says to leave off."""
        result = Look()
        by_agent: dict[Agent, list[Arena]] = {}
        for arena in arenas:
            by_agent.setdefault(arena.agent, []).append(arena)
        turns = asyncio.Semaphore(_AGENTS_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for agent, its_arenas in by_agent.items():
                group.create_task(self._agent(agent, its_arenas, turns, interrupted, result))
        return result

    async def _agent(
        self,
        agent: Agent,
        arenas: Sequence[Arena],
        turns: asyncio.Semaphore,
        interrupted: Callable[[], bool],
        result: Look,
    ) -> None:
        async with turns:
            pages = sum(len(arena.pages) for arena in arenas)
            deadline = _now() + self._answer_seconds * (1 + pages / _PACE_PAGES)
            for arena in arenas:
                try:
                    await self._arena(arena, deadline, interrupted, result)
                except (TimeoutError, PeerGoneError):
                    break
                except OrderRefusedError as error:
                    log.debug("agent refuses an order", pid=agent.peer.pid, errno=error.args[0])

    async def _arena(
        self, arena: Arena, deadline: float, interrupted: Callable[[], bool], result: Look
    ) -> None:
        for first in range(0, len(arena.pages), wire.FINGERPRINT_PAGES_MAX):
            if interrupted() or arena.closed:
                return
            count = min(wire.FINGERPRINT_PAGES_MAX, len(arena.pages) - first)
            began = _now()
            fresh, states = await self._order(arena, first, count, deadline)
            result.agent_seconds += _now() - began
            async with self._books.lock:
                if not arena.closed:
                    result.written += self._books.update(arena, first, fresh, states)
        arena.passes += 1
        result.seen.add(arena)

    async def _order(
        self, arena: Arena, first: int, count: int, deadline: float
    ) -> tuple[fp.Fingerprints, Flags]:
        """Have pages looked at, and copy the answer out of the window.

        Raises:
            TimeoutError: the agent is late, now or from before.
            PeerGoneError: it has gone, or was dropped.
            OrderRefusedError: it could not.
        """
        agent = arena.agent
        if agent.silent:
            raise TimeoutError
        remaining = deadline - _now()
        order = asyncio.create_task(
            agent.peer.order(
                wire.Type.FINGERPRINT, arena.number, wire.PAGE_RANGE.pack(first, count)
            )
        )
        order.add_done_callback(_retrieve)
        agent.order = order
        await asyncio.wait({order}, timeout=min(self._answer_seconds, remaining))
        if not order.done():
            log.warning("agent does not answer in time", pid=agent.peer.pid)
            raise TimeoutError
        order.result()
        return _copy_answer(agent, count)


def _copy_answer(agent: Agent, count: int) -> tuple[fp.Fingerprints, Flags]:
    """The window's contents as they are now: the agent can change them at any time."""
    window = agent.peer.window
    end = count * fp.FINGERPRINT_BYTES
    fresh = np.frombuffer(window, "<u8", 2 * count).reshape(count, 2).copy()
    states = np.frombuffer(window, np.uint8, count, end).copy()
    if int(states.max()) > max(wire.PageState):
        log.warning("agent dropped", pid=agent.peer.pid, why="page states out of range")
        agent.peer.close()
        raise PeerGoneError
    return fresh, states


def _now() -> float:
    return asyncio.get_running_loop().time()


def _retrieve(order: asyncio.Task[Outcomes]) -> None:
    """Look at the error of an order that nobody waits for any more."""
    if not order.cancelled():
        order.exception()
