"""Arenas that announce themselves again, after their agent has found another merger.

An agent says first how much there is to say (ARENA_OPEN), then which slots the arena maps
(EXTENTS), then which of its pages are away (AWAY_PAGES). The arena is open when all of it was said,
and only then the agent is answered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from samepage.daemon import wire
from samepage.daemon.peers import Peer
from samepage_merger.arena import Arena, Session
from samepage_merger.cluster.away import digests_of
from samepage_merger.runs import ascends, batches, expand, within

_BATCH_PAGES = 1 << 20

log = structlog.get_logger(__name__)


class _Announcement:
    """How far the extents and the away pages of an arena have come.

    Attributes:
        fd: the store's descriptor that the answer passes on; -1 when the agent has it.
    """

    def __init__(self, wanted: wire.ArenaOpen, seq: int, fd: int = -1) -> None:
        self.extents_left = wanted.extents
        self.away_left = wanted.away
        self.domain = wanted.domain
        self.seq = seq
        self.fd = fd
        self.next_page = 0
        self.next_away = 0

    @property
    def complete(self) -> bool:
        return not (self.extents_left or self.away_left)


class Announcements:
    """Those that are under way.

    Args:
        wake: called when one was completed.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._under_way: dict[Arena, _Announcement] = {}

    def begin(
        self, session: Session, arena: Arena, wanted: wire.ArenaOpen, seq: int, fd: int = -1
    ) -> None:
        """Expect what the agent has said that there is; it may be nothing.

        Args:
            fd: the store's descriptor that the answer passes on, and which is closed then; -1 when
                the agent has it.
        """
        self._under_way[arena] = _Announcement(wanted, seq, fd)
        self._finish_if_complete(session, arena)

    def extents(self, session: Session, message: wire.Message, descriptors: Sequence[int]) -> None:
        """Take in mappings of slots.

        Raises:
            ProtocolError: the peer must be dropped.
        """
        arena = session.arenas.get(message.arena)
        if arena is None:
            # It was refused, which the agent did not know yet.
            return
        announcement = self._under_way.get(arena)
        if announcement is None:
            raise wire.ProtocolError("EXTENTS of an arena that is not being announced")
        extents = wire.unpack_records(wire.EXTENT, message)
        page, count, slot = extents["page"], extents["count"], extents["slot"]
        if not within(page, count, arena.pages) or not within(
            slot, count, arena.domain.store.slots
        ):
            raise wire.ProtocolError("EXTENTS outside the arena or the store")
        if bool((slot == wire.ZERO_SLOT).any()):
            raise wire.ProtocolError("EXTENTS with slot 0")
        starts = np.append(page, np.uint64(arena.pages)).astype(np.int64)
        ends = np.append(announcement.next_page, (page + count).astype(np.int64))
        if bool((starts < ends).any()):
            raise wire.ProtocolError("EXTENTS that overlap or do not ascend")
        announcement.extents_left -= extents.size
        if announcement.extents_left < 0:
            raise wire.ProtocolError("more EXTENTS than announced")
        announcement.next_page = int(ends[-1])
        for run, offset, length in batches(count.astype(np.int64), _BATCH_PAGES):
            arena.domain.extend(
                arena,
                expand(page[run].astype(np.int64) + offset, length),
                expand(slot[run].astype(np.int64) + offset, length),
            )
        self._finish_if_complete(session, arena)

    def away_pages(
        self, session: Session, message: wire.Message, descriptors: Sequence[int]
    ) -> None:
        """Take in pages that are away.

        Raises:
            ProtocolError: the peer must be dropped.
        """
        arena = session.arenas.get(message.arena)
        if arena is None:
            return
        announcement = self._under_way.get(arena)
        if announcement is None or announcement.extents_left:
            raise wire.ProtocolError("AWAY_PAGES of an arena that does not announce them now")
        records = wire.unpack_records(wire.AWAY, message)
        pages = records["page"].astype(np.int64)
        if bool((records["page"] >= arena.pages).any()):
            raise wire.ProtocolError("AWAY_PAGES outside the arena")
        if not ascends(np.append(announcement.next_away - 1, pages)):
            raise wire.ProtocolError("AWAY_PAGES that do not ascend")
        announcement.away_left -= records.size
        if announcement.away_left < 0:
            raise wire.ProtocolError("more AWAY_PAGES than announced")
        if records.size:
            announcement.next_away = int(pages[-1]) + 1
            if bool(arena.map.slots(pages).any()):
                raise wire.ProtocolError("AWAY_PAGES that map slots")
            arena.domain.announce_away(arena, pages, digests_of(records))
        self._finish_if_complete(session, arena)

    def forget(self, arena: Arena) -> None:
        """It was closed, or its connection has ended."""
        announcement = self._under_way.pop(arena, None)
        if announcement is not None and announcement.fd >= 0:
            os.close(announcement.fd)

    def _finish_if_complete(self, session: Session, arena: Arena) -> None:
        announcement = self._under_way[arena]
        if not announcement.complete:
            return
        arena.domain.announced(arena)
        passed = [announcement.fd] if announcement.fd >= 0 else []
        answer_opened(session.peer, announcement.seq, arena, passed, announcement.domain)
        self.forget(arena)
        self._wake()
        log.debug("arena announced again", domain=arena.domain.name, name=arena.name)


def answer_opened(
    peer: Peer, seq: int, arena: Arena, descriptors: Sequence[int], wanted: str
) -> None:
    """Tell an agent that its arena is open, by the number of its lock."""
    payload = wire.pack_arena_opened(arena.lock, wanted, arena.domain.name)
    peer.send(wire.Type.ARENA_OPENED, seq, arena.number, payload, descriptors)
