"""What the merger knows of an arena and of the connection that it came on.

When each part of it changes is the concern of its domain (domains.py).
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from samepage.daemon.peers import Peer
from samepage_merger.cluster.away import AwayMap
from samepage_merger.pagemap import PageMap

if TYPE_CHECKING:
    from samepage_merger.domains import Domain


class State(enum.Enum):
    """Where an arena is in its life."""

    ANNOUNCING = enum.auto()
    OPEN = enum.auto()
    LIMBO = enum.auto()
    CLOSED = enum.auto()


@dataclass(eq=False)
class Session:
    """One connection of an agent.

    Attributes:
        arenas: by number; open or announcing.
        closing: closed arenas that orders in flight still name.
        reading: whoever uses the window holds it.
        overdue: orders that were not answered in time, and still are not.
        reconnected: an arena was announced again on it.
        sealed: numbers of arenas that can only be read.
    """

    peer: Peer
    arenas: dict[int, Arena] = field(default_factory=dict)
    closing: set[Arena] = field(default_factory=set)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    overdue: int = 0
    reconnected: bool = False
    sealed: set[int] = field(default_factory=set)

    def caught_up(self) -> None:
        """An order that was late has been answered."""
        self.overdue -= 1


@dataclass(eq=False)
class Arena:
    """One arena of one agent.

    Attributes:
        lock: the number of the lock on its store descriptor.
        previous: what it mapped before it began to announce itself again.
        away: its pages whose bytes are not on this host.
        previous_away: those that were away before it began to announce itself again.
        left: the snapshot with which it was left to another host; zeros when it was not.
        frozen_until: its writers were stopped until then, by the monotonic clock.
        leaving: on which connection an order to leave it was not answered yet.
        holds, pins: of orders in flight on its connection.
        stale_holds, stale_pins: of orders whose connection ended before the answer.
        promoting: held while pages of it are given slots.
        restored: pages that became private again, ever.
    """

    domain: Domain
    agent: bytes
    number: int
    name: str
    lock: int
    map: PageMap
    away: AwayMap
    session: Session | None = None
    state: State = State.ANNOUNCING
    previous: list[PageMap] = field(default_factory=list)
    previous_away: list[AwayMap] = field(default_factory=list)
    left: bytes = bytes(16)
    frozen_until: float = 0.0
    leaving: Session | None = None
    holds: set[int] = field(default_factory=set)
    stale_holds: set[int] = field(default_factory=set)
    pins: set[int] = field(default_factory=set)
    stale_pins: set[int] = field(default_factory=set)
    promoting: asyncio.Lock = field(default_factory=asyncio.Lock)
    restored: int = 0

    @property
    def pages(self) -> int:
        """Size in pages."""
        return self.map.pages

    @property
    def sealed(self) -> bool:
        """Whether it can only be read, as its agent said on this connection."""
        return self.session is not None and self.number in self.session.sealed
