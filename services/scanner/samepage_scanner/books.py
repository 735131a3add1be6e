"""What the scanner knows: agents, their arenas, and the domains that these belong to.

The books change in the event loop alone. Two things look at them from other threads meanwhile:
matching, which only reads, and the publisher's collecting, which also marks pages as published.
`Books.lock` keeps looks at pages and collecting apart; arenas may come and go at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from samepage.daemon import secrets
from samepage.daemon.peers import Outcomes, Peer
from samepage.daemon.wire import PageState
from samepage_scanner import fingerprints as fp
from samepage_scanner.attention import BLOCK_PAGES, Attention
from samepage_scanner.coldness import Coldness
from samepage_scanner.match import Match
from samepage_scanner.pages import PUBLISHED, Flags, Pages
from samepage_scanner.threads import Threads

# A feature bit of HELLO (docs/protocol.md).
TRACKS_WRITES = 1 << 6


class BooksFullError(Exception):
    """The books have no room for another arena of this size."""


@dataclass(eq=False, slots=True)
class Agent:
    """One connected agent.

    Attributes:
        arenas: by their number within the agent.
        order: its last order, in flight or done.
        threads: those that work for it in its process.
    """

    peer: Peer
    threads: Threads
    arenas: dict[int, Arena] = field(default_factory=dict)
    order: asyncio.Task[Outcomes] | None = None

    @property
    def silent(self) -> bool:
        """Whether it still owes the answer to an order."""
        return self.order is not None and not self.order.done()


@dataclass(eq=False, slots=True)
class Arena:
    """One arena of one agent.

    Attributes:
        number: within its agent.
        attention: where to look next.
        coldness: what stood still for how long.
        passes: how many times all of it was looked at.
        names_writes: its agent has not said that it cannot.
        closed: it is no more.
        known_to_index: some of its pages may be published.
    """

    agent: Agent
    number: int
    name: str
    domain: Domain
    pages: Pages
    attention: Attention
    coldness: Coldness
    passes: int = 0
    names_writes: bool = True
    closed: bool = False
    known_to_index: bool = False

    @property
    def tracked(self) -> bool:
        """Whether its agent names the pages that were written."""
        return self.names_writes and bool(self.agent.peer.features & TRACKS_WRITES)


@dataclass(eq=False, slots=True)
class Domain:
    """Arenas that may share with each other.

    Attributes:
        seed: of its fingerprints, 64 bits.
        identity: the 16 bytes by which the index knows it.
        arenas: in the order in which they were opened.
        dirty: matching could find something that it did not find last time.
        quiet: what matching for a share found when it found nothing to do, with the minimum run
            that it was told; holds until the domain is dirty.
        untold: there may be something that the index was not told of.
        sampled: zero bits at the end of every fingerprint that was published, at the least.
        retired: fingerprints that the index knows and that a page of this host lost.
        buried: closed arenas whose pages the index may know.
    """

    name: str
    seed: int
    identity: bytes
    arenas: list[Arena] = field(default_factory=list)
    dirty: bool = False
    quiet: tuple[int, Match] | None = None
    untold: bool = False
    sampled: int = 0
    retired: list[fp.Fingerprints] = field(default_factory=list)
    buried: list[Arena] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Nothing is left to do for it."""
        return not (self.arenas or self.retired or self.buried)

    def find(self, name: str) -> list[Arena]:
        """The arenas of this name. Names are the merger's to keep unique: for a moment, while
        one arena goes and its successor comes, there may be two."""
        return [arena for arena in self.arenas if arena.name == name]


class Books:
    """All agents, arenas and domains of this host.

    Args:
        secret: the cluster's.
        pages_max: how many pages all arenas together may have.
    """

    def __init__(self, secret: bytes, pages_max: int) -> None:
        self._secret = secret
        self._pages_max = pages_max
        self.agents: dict[Peer, Agent] = {}
        self.domains: dict[str, Domain] = {}
        self.pages = 0
        self.pages_scanned = 0
        self.connections = 0
        self.lock = asyncio.Lock()

    def arenas(self) -> Iterator[Arena]:
        """All open arenas."""
        for domain in self.domains.values():
            yield from domain.arenas

    def select(self, domain: str, arena: str) -> list[Arena]:
        """The open arenas of a domain and of a name, each of which may be empty for any."""
        known = self.domains.get(domain)
        chosen = [known] if known else [] if domain else list(self.domains.values())
        return [each for some in chosen for each in (some.find(arena) if arena else some.arenas)]

    def identified(self, identity: bytes) -> Domain | None:
        """The domain that the index knows by this."""
        return next((d for d in self.domains.values() if d.identity == identity), None)

    def connect(self, peer: Peer) -> None:
        """An agent is there."""
        self.connections += 1
        self.agents[peer] = Agent(peer, Threads(peer.pid))

    def disconnect(self, peer: Peer) -> None:
        """An agent has gone, and its arenas with it."""
        agent = self.agents.pop(peer)
        for arena in list(agent.arenas.values()):
            self.close(arena)

    def open(self, peer: Peer, number: int, name: str, domain_name: str, pages: int) -> Arena:
        """Note a new arena; name, domain, number and size were checked.

        Raises:
            BooksFullError: there is no room for it.
        """
        if self.pages + pages > self._pages_max:
            raise BooksFullError
        try:
            space, attention = Pages(pages), Attention(pages)
        except MemoryError as error:
            raise BooksFullError from error
        domain = self.domains.get(domain_name)
        if domain is None:
            domain = Domain(
                domain_name,
                secrets.domain_seed(self._secret, domain_name),
                secrets.domain_id(self._secret, domain_name),
            )
            self.domains[domain_name] = domain
        agent = self.agents[peer]
        arena = Arena(agent, number, name, domain, space, attention, Coldness(pages))
        agent.arenas[number] = arena
        domain.arenas.append(arena)
        self.pages += pages
        return arena

    def close(self, arena: Arena) -> None:
        """An arena is no more."""
        arena.closed = True
        del arena.agent.arenas[arena.number]
        domain = arena.domain
        domain.arenas.remove(arena)
        domain.dirty = domain.untold = True
        self.pages -= len(arena.pages)
        if arena.known_to_index:
            domain.buried.append(arena)
        elif domain.idle:
            del self.domains[domain.name]

    def update(
        self, arena: Arena, pages: fp.Indices, fresh: fp.Fingerprints, states: Flags
    ) -> fp.Mask:
        """Note what pages of an arena look like now; call with the lock held.

        Returns:
            Which of them look different than before.
        """
        change = arena.pages.update(pages, fresh, states)
        arena.attention.unsettled[change.unsettled // BLOCK_PAGES] = True
        self.pages_scanned += int(np.count_nonzero(states != PageState.ABSENT))
        if change.matters:
            arena.domain.dirty = arena.domain.untold = True
        if len(change.retired):
            arena.domain.retired.append(change.retired)
            arena.domain.untold = True
        return change.differs

    def settle(self, arena: Arena, pages: fp.Indices) -> None:
        """Note that pages were not written since they were looked at; with the lock held."""
        if arena.pages.settle(pages):
            arena.domain.dirty = arena.domain.untold = True

    def bury(self) -> None:
        """Let go of closed arenas, but for what the index knows of them; with the lock held."""
        for domain in list(self.domains.values()):
            for arena in domain.buried:
                pages = arena.pages
                for block in pages.blocks():
                    published = (pages.flags[block] & PUBLISHED) != 0
                    if published.any():
                        domain.retired.append(pages.fingerprints[block][published])
                        domain.untold = True
            domain.buried.clear()
            if domain.idle:
                del self.domains[domain.name]
