"""The agents' connections: which arenas they open and close, and what they say of them.

Those that are announced again are in announcing.py until all of them is said.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import structlog

from samepage.daemon import secrets, wire
from samepage.daemon.identity import DeniedError, Identity, SocketIdentity, choose_domain
from samepage.daemon.peers import Peer
from samepage.errors import InvalidArgumentError
from samepage_merger.announcing import Announcements, answer_opened
from samepage_merger.arena import Arena, Session, State
from samepage_merger.domains import Domain, Domains, RefusedError
from samepage_merger.runs import Int64s, batches, expand, unique, within

WINDOW_BYTES = wire.READ_PAGES_MAX * wire.PAGE_SIZE
ARENA_PAGES_MAX = 2**36
ARENAS_PER_AGENT_MAX = 4096

_BATCH_PAGES = 1 << 20
_LONG_RANGE = 1 << 16

#: Pages that an eviction let go since other hosts hold them, spilled, kept, found no room for.
Evicted = tuple[int, int, int, int]

log = structlog.get_logger(__name__)


class AwayRequests(Protocol):
    """What agents ask for about away pages. Called in the event loop, must not block."""

    def fetch(self, arena: Arena, pages: Int64s) -> None:
        """Somebody waits for these away pages; they are in the order in which they are wanted."""

    async def evict(self, arena: Arena, first: Int64s, count: Int64s) -> Evicted:
        """Let ranges of pages leave the host; return how many pages other hosts hold, were spilled,
        were kept, found no room.

        Raises:
            RefusedError: it cannot be done here.
        """


class CloneRequests(Protocol):
    """Who makes clones. Called in the event loop, must not block."""

    def clone(self, session: Session, message: wire.Message) -> None:
        """Begin one.

        Raises:
            ProtocolError: the message makes no sense.
        """

    def opened(self, session: Session, arena: Arena) -> None:
        """An agent has made an arena."""

    def closed(self, session: Session, number: int) -> None:
        """An agent has closed an arena, or was refused one."""

    def disconnected(self, session: Session) -> None:
        """An agent's connection has ended."""


class Agents:
    """Handler of the peers on merger.sock.

    Args:
        domains: the books to keep.
        wake: called when an arena went to limbo.
        identity: says which domains an agent may use.

    Attributes:
        requests: who answers what agents ask for about away pages; None where nobody does.
        clones: who makes clones; None where nobody does.
    """

    def __init__(
        self,
        domains: Domains,
        wake: Callable[[], None],
        identity: Identity | None = None,
    ) -> None:
        self._domains = domains
        self._identity = identity or SocketIdentity()
        self._wake = wake
        self.clones: CloneRequests | None = None
        self.requests: AwayRequests | None = None
        self._evictions: set[asyncio.Task[None]] = set()
        self._sessions: dict[Peer, Session] = {}
        self._by_agent: dict[bytes, Session] = {}
        self._announcements = Announcements(wake)
        self.connections = 0
        self.reconnects = 0
        # Faults served by all agents so far, by how long a thread waited (docs/protocol.md).
        self.stalls = [0] * wire.STALL_BUCKETS
        self._messages = {
            wire.Type.ARENA_OPEN: self._open,
            wire.Type.ARENA_CLOSE: self._close,
            wire.Type.EXTENTS: self._announcements.extents,
            wire.Type.AWAY_PAGES: self._announcements.away_pages,
            wire.Type.FETCH: self._fetch,
            wire.Type.EVICT_ARENA: self._evict,
            wire.Type.CLONE: self._clone,
            wire.Type.SEALED: self._sealed,
            wire.Type.RESTORED: self._restored,
            wire.Type.STALLS: self._stalled,
            wire.Type.ACCOUNT: self._account,
        }

    def __len__(self) -> int:
        return len(self._sessions)

    def older(self) -> int:
        """How many speak an older version of the protocol."""
        return sum(peer.version < wire.VERSION for peer in self._sessions)

    def find(self, agent: bytes, number: int) -> Arena | None:
        """Return an open arena of a connected agent."""
        session = self._by_agent.get(agent)
        arena = session.arenas.get(number) if session is not None else None
        return arena if arena is not None and arena.state is State.OPEN else None

    def connected(self, peer: Peer) -> None:
        """Welcome a peer; a newer connection of the same process replaces the older."""
        older = self._by_agent.get(peer.agent)
        if older is not None:
            if (older.peer.uid, older.peer.pid) != (peer.uid, peer.pid):
                log.warning("an agent's number that another process has", pid=peer.pid)
                peer.close()
                return
            older.peer.close()
        self.connections += 1
        session = Session(peer)
        self._sessions[peer] = session
        self._by_agent[peer.agent] = session

    def disconnected(self, peer: Peer) -> None:
        """Put the peer's arenas into limbo: a broken connection is not a death."""
        session = self._sessions.pop(peer, None)
        if session is None:
            return
        del self._by_agent[peer.agent]
        if self.clones is not None:
            self.clones.disconnected(session)
        for arena in (*session.arenas.values(), *session.closing):
            self._announcements.forget(arena)
            arena.domain.disconnect(arena)
        self._wake()

    def received(self, peer: Peer, message: wire.Message, descriptors: Sequence[int]) -> None:
        """Apply one message.

        Raises:
            ProtocolError: the peer must be dropped.
        """
        handle = self._messages.get(message.type)
        if handle is None:
            raise wire.ProtocolError(f"{message.type.name} is not for the merger")
        try:
            handle(self._sessions[peer], message, descriptors)
        except RefusedError as refused:
            peer.refuse(message, *refused.args)
            if message.type is wire.Type.ARENA_OPEN and self.clones is not None:
                self.clones.closed(self._sessions[peer], message.arena)

    def _open(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        wanted = wire.unpack_arena_open(message)
        if message.arena == 0:
            raise wire.ProtocolError("ARENA_OPEN of arena 0")
        old = session.arenas.get(message.arena)
        if old is not None and (old.lock != wanted.lock or old.state is not State.OPEN):
            raise wire.ProtocolError(f"ARENA_OPEN of arena {message.arena}, which is open")
        if old is None and len(session.arenas) >= ARENAS_PER_AGENT_MAX:
            text = f"this process has {ARENAS_PER_AGENT_MAX} arenas: close some first"
            raise RefusedError(errno.EMFILE, text)
        domain = self._checked_domain(session.peer, wanted)
        if wanted.lock and not session.reconnected:
            session.reconnected = True
            self.reconnects += 1
        try:
            if wanted.lock and (descriptors or old is not None):
                self._announce(session, message, wanted, domain, descriptors)
            elif wanted.extents:
                raise RefusedError(errno.ESTALE, _STALE)
            else:
                self._create(session, message, wanted, domain)
            arena = session.arenas.get(message.arena)
            if arena is not None and any(wanted.left):
                domain.leave(arena, wanted.left)
        except MemoryError as error:
            raise RefusedError(errno.ENOMEM, f"{error}: ask for less") from error
        except OSError as error:
            log.warning("cannot open a store for an agent", domain=domain.name, why=str(error))
            text = f"the merger cannot open the domain's store ({error.strerror}): see its log"
            raise RefusedError(error.errno or errno.EIO, text) from error

    def _checked_domain(self, peer: Peer, wanted: wire.ArenaOpen) -> Domain:
        if not 0 < wanted.pages <= ARENA_PAGES_MAX:
            text = f"an arena has 1 to {ARENA_PAGES_MAX} pages, not {wanted.pages}"
            raise RefusedError(errno.EINVAL, text)
        if wanted.extents + wanted.away > wanted.pages:
            raise wire.ProtocolError("ARENA_OPEN with more extents and away pages than pages")
        try:
            secrets.check_name(wanted.name)
            return self._domains.open(self._chosen_domain(peer, wanted.domain))
        except InvalidArgumentError as error:
            raise RefusedError(errno.EINVAL, str(error)) from error

    def _chosen_domain(self, peer: Peer, wanted: str) -> str:
        try:
            return choose_domain(self._identity, peer, wanted)
        except DeniedError as denied:
            raise RefusedError(*denied.args) from denied

    def _create(
        self, session: Session, message: wire.Message, wanted: wire.ArenaOpen, domain: Domain
    ) -> None:
        peer = session.peer
        domain.claim(wanted.name, peer.agent)
        arena, fd = domain.create(peer.agent, message.arena, wanted.name, wanted.pages)
        arena.session = session
        session.arenas[message.arena] = arena
        if wanted.away:
            # Its store was another merger's: it comes with nothing but what is away.
            arena.state = State.ANNOUNCING
            self._announcements.begin(session, arena, wanted, message.seq, fd)
            return
        try:
            answer_opened(peer, message.seq, arena, [fd], wanted.domain)
        except OSError:
            del session.arenas[message.arena]
            domain.close(arena)
            raise
        finally:
            os.close(fd)
        log.debug("arena opened", domain=domain.name, name=arena.name, pages=arena.pages)
        if self.clones is not None:
            self.clones.opened(session, arena)

    def _announce(
        self,
        session: Session,
        message: wire.Message,
        wanted: wire.ArenaOpen,
        domain: Domain,
        descriptors: Sequence[int],
    ) -> None:
        agent = session.peer.agent
        old = session.arenas.get(message.arena)
        if old is None:
            if not domain.locks.proves(descriptors[0], wanted.lock):
                raise RefusedError(errno.ESTALE, _STALE)
            old = domain.limbo_of(agent, wanted.lock)
        elif old.domain is not domain:
            raise wire.ProtocolError("an arena does not change its domain")
        domain.claim(wanted.name, agent, own=old)
        arena = domain.announce(old, agent, message.arena, wanted.name, wanted.lock, wanted.pages)
        arena.session = session
        session.arenas[message.arena] = arena
        self._announcements.begin(session, arena, wanted, message.seq)

    def _fetch(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        arena = session.arenas.get(message.arena)
        if arena is None or self.requests is None:
            return
        self.requests.fetch(arena, arena.away.within(*_ranges(arena, message)))

    def _evict(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        arena = session.arenas.get(message.arena)
        if arena is None:
            raise RefusedError(errno.ENOENT, _UNKNOWN)
        if self.requests is None:
            raise RefusedError(errno.EOPNOTSUPP, "this merger evicts nothing")
        work = self._answer_eviction(
            session, message, self.requests.evict(arena, *_ranges(arena, message))
        )
        task = asyncio.ensure_future(work)
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)

    async def _answer_eviction(
        self, session: Session, request: wire.Message, work: Coroutine[object, object, Evicted]
    ) -> None:
        answer = functools.partial(session.peer.refuse, request, errno.EAGAIN, _FAILED)
        try:
            payload = wire.EVICTED.pack(*await work)
        except RefusedError as refused:
            answer = functools.partial(session.peer.refuse, request, *refused.args)
        else:
            answer = functools.partial(
                session.peer.send, wire.Type.EVICTED, request.seq, request.arena, payload
            )
        finally:
            # Whatever ended it: a thread of the application waits for the answer.
            answer()

    def _clone(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        if self.clones is None:
            raise RefusedError(errno.EOPNOTSUPP, "this merger clones nothing: give it an index")
        # Who makes clones need not know who is who.
        wanted = wire.unpack_clone(message)
        settled = replace(wanted, domain=self._chosen_domain(session.peer, wanted.domain))
        self.clones.clone(session, replace(message, payload=wire.pack_clone(settled)))

    def _close(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        if self.clones is not None:
            self.clones.closed(session, message.arena)
        session.sealed.discard(message.arena)
        arena = session.arenas.get(message.arena)
        if arena is None:
            return
        if arena.state is not State.OPEN:
            raise wire.ProtocolError("ARENA_CLOSE before all EXTENTS")
        del session.arenas[message.arena]
        arena.domain.close(arena)
        if arena.holds:
            session.closing.add(arena)
        log.debug("arena closed", domain=arena.domain.name, name=arena.name)

    def _sealed(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        if len(session.sealed) >= ARENAS_PER_AGENT_MAX:
            raise wire.ProtocolError("SEALED of more arenas than there may be")
        session.sealed.add(message.arena)

    def _stalled(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        seen = wire.unpack(wire.STALLS, message)
        self.stalls = [sum(pair) for pair in zip(self.stalls, seen, strict=True)]

    def _restored(
        self, session: Session, message: wire.Message, descriptors: Sequence[int]
    ) -> None:
        arena = session.arenas.get(message.arena)
        if arena is None:
            # It was refused, or closed: nothing of it is in the books.
            return
        for pages in _mapped(arena, *_ranges(arena, message)):
            arena.domain.restore(arena, pages)

    def _account(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        arena = session.arenas.get(message.arena)
        if arena is None:
            raise RefusedError(errno.ENOENT, _UNKNOWN)
        payload = wire.ACCOUNTED.pack(arena.map.shared, arena.domain.books.saved_bytes(arena.map))
        session.peer.send(wire.Type.ACCOUNTED, message.seq, message.arena, payload)


_UNKNOWN = "the merger does not know this arena: open it first"
_FAILED = (
    "the merger failed in the middle of evicting, and its log says why: what has left is safe, try"
    " again later"
)
_STALE = (
    "these mappings are not of this merger's store: restore the pages from your own descriptor,"
    " and open the arena anew"
)


def _ranges(arena: Arena, message: wire.Message) -> tuple[Int64s, Int64s]:
    """Return first and count of the ranges in a message.

    Raises:
        ProtocolError: one is empty, or not within the arena.
    """
    ranges = wire.unpack_records(wire.RANGE, message)
    if not within(ranges["page"], ranges["count"], arena.pages):
        raise wire.ProtocolError(f"{message.type.name} outside the arena")
    return ranges["page"].astype(np.int64), ranges["count"].astype(np.int64)


def _mapped(arena: Arena, page: Int64s, count: Int64s) -> Iterable[Int64s]:
    """Return pages of the ranges, at least all those that map a slot, each once a part."""
    long = count > _LONG_RANGE
    for first, length in zip(page[long].tolist(), count[long].tolist(), strict=True):
        yield arena.map.mapped(first, length)
    page, count = page[~long], count[~long]
    for run, offset, length in batches(count, _BATCH_PAGES):
        yield unique(expand(page[run] + offset, length))
