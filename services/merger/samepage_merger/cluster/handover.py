"""Asks other hosts to let go, until it is known that they have: hand-overs, and snapshots' ends.

What is to be asked is in a note (journal.py), so it survives this merger. Whose an arena is that
the source was asked to leave, only its host can say: from here, one that is cut off from everybody
looks like one that is gone, but its application goes on. So that is asked until it answers, or an
operator says that it is gone, or that nobody else has what its host says it will never know of
(docs/decisions/0007-who-owns-a-migrated-arena.md). A snapshot's end is only a courtesy: a host that
has no lease in the index for a while, and does not answer, needs none.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog

from samepage.daemon.failpoints import failpoint
from samepage.errors import InvalidArgumentError, SamepageError
from samepage.v1 import pages_pb2_grpc
from samepage_merger.cluster.hosts import HostAwayError
from samepage_merger.cluster.journal import Journal, Note
from samepage_merger.cluster.place import Place
from samepage_merger.cluster.process import Process
from samepage_merger.cluster.source import Snapshot
from samepage_merger.domains import Domains, RefusedError

_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 0.1
_PAUSE_SECONDS_MAX = 10.0
# A lease may lapse while the host is well: its scanner restarts, the index is replaced.
_GONE_SECONDS = 30.0
_SWEEP_SECONDS = 2.0

Key = tuple[bytes, int]

log = structlog.get_logger(__name__)


class Host(Protocol):
    """Another host's merger."""

    @property
    def stub(self) -> pages_pb2_grpc.PagesAsyncStub: ...


class Hosts(Protocol):
    """The other hosts of the cluster."""

    async def live(self) -> Mapping[str, Host]:
        """Return those that have a lease in the index.

        Raises:
            HostAwayError: the index is away.
        """

    async def find(self, name: str) -> Host | None:
        """Return one that has a lease by its name, one that just came too.

        Raises:
            HostAwayError: the index is away.
        """

    def known(self, names: Iterable[str]) -> Sequence[Host]:
        """Return those of the hosts that were ever heard of."""


class HandOver:
    """One arena that its source is asked to leave to this host."""

    def __init__(self, note: Note, known: asyncio.Future[Note]) -> None:
        self.note = note
        self._known = known

    @property
    def host(self) -> str:
        """The source."""
        return self.note.host

    @property
    def known(self) -> bool:
        """Whether it is known what became of it."""
        return self._known.done()

    async def settled(self) -> None:
        """Wait until it is."""
        await asyncio.shield(self._known)

    async def result(self) -> Note:
        """Return what became of it, as soon as it is known.

        Raises:
            RefusedError: the source kept the arena.
        """
        note = await asyncio.shield(self._known)
        if not note.left:
            raise RefusedError(
                errno.ETIMEDOUT, f"the freeze was over: {note.host!r} kept the arena"
            )
        return note


class HandOvers:
    """All hand-overs of this host, and what is yet to be ended elsewhere.

    Args:
        domains: of this host, which tell whether an arena lives.
    """

    def __init__(self, hosts: Hosts, journal: Journal, domains: Domains) -> None:
        self._hosts = hosts
        self._journal = journal
        self._domains = domains
        self._by_key: dict[Key, HandOver] = {}
        # Snapshots of which the source's host says that it will never know what became of them,
        # and those of which an operator has said that nobody else has the arena.
        self._lost: set[str] = set()
        self._given: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Go on with what an earlier life of this merger began; keep the notes short."""
        for note in self._journal.read():
            if note.leaving:
                self._begin(note, time.monotonic() - note.freeze_us / 1e6)
            else:
                self.end(note)
        self._spawn(self._sweep_forever())

    async def close(self) -> None:
        """Stop asking; the notes stay."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def find(self, key: Key) -> HandOver | None:
        """Return the hand-over of an agent's arena."""
        return self._by_key.get(key)

    def begin(self, note: Note, frozen_at: float) -> HandOver:
        """Ask the source to leave; from now on nobody but it decides whose the arena is.

        Raises:
            OSError: that cannot be noted: nobody was asked.
        """
        note = replace(note, leaving=True)
        self._journal.write(note)
        failpoint("migrate.noted")
        return self._begin(note, frozen_at)

    def end(self, note: Note) -> None:
        """Let a source forget a snapshot, in the background; its note goes when it has."""
        self._spawn(self._end(note))

    async def forget_host(self, name: str) -> int:
        """A host is gone for good, and all processes that ran there; or it has answered that it
        will never know whom it left an arena to, and no other host has that. Return how many arenas
        are this host's for that.

        Raises:
            InvalidArgumentError: it has a lease in the index, and did not answer that.
            HostAwayError: the index is away.
        """
        waiting = [each for each in self._by_key.values() if not each.known and each.host == name]
        if name in await self._hosts.live():
            waiting = [each for each in waiting if each.note.snapshot in self._lost]
            if not waiting:
                raise InvalidArgumentError(_alive(name))
        if waiting:
            self._given |= {each.note.snapshot for each in waiting}
            await asyncio.wait([asyncio.ensure_future(each.settled()) for each in waiting])
        return len(waiting)

    def forget(self, key: Key) -> None:
        """The agent has closed the arena."""
        handover = self._by_key.pop(key, None)
        if handover is not None:
            self._journal.forget(handover.note)

    def _begin(self, note: Note, frozen_at: float) -> HandOver:
        known: asyncio.Future[Note] = asyncio.get_running_loop().create_future()
        handover = HandOver(note, known)
        self._by_key[bytes.fromhex(note.agent), note.number] = handover
        if note.left:
            known.set_result(note)
        else:
            self._spawn(self._ask(handover, known, frozen_at))
        return handover

    async def _ask(self, handover: HandOver, known: asyncio.Future[Note], frozen_at: float) -> None:
        note = handover.note
        left = await self._until_answered(note, _left, needed=True)
        self._lost.discard(note.snapshot)
        if left is None:
            log.warning("an operator said that nobody else has an arena", host=note.host)
        took = round((time.monotonic() - frozen_at) * 1e6)
        note = replace(note, left=left is not False, freeze_us=took)
        handover.note = note
        if note.left:
            self._journal.write(note)
        else:
            self._by_key.pop((bytes.fromhex(note.agent), note.number), None)
        known.set_result(note)
        await self._until_answered(note, _ended)
        if not note.left:
            self._journal.forget(note)

    async def _end(self, note: Note) -> None:
        await self._until_answered(note, _ended)
        self._journal.forget(note)

    async def _until_answered(
        self,
        note: Note,
        call: Callable[[Snapshot], Coroutine[Any, Any, bool]],
        *,
        needed: bool = False,
    ) -> bool | None:
        """Return what the other host answers, however long it takes; None when it is gone.

        Args:
            needed: nobody but an operator may say that it is gone.
        """
        pause = _PAUSE_SECONDS
        gone_since: float | None = None
        told = False
        while True:
            live = True
            try:
                live = note.host in await self._hosts.live()
                # One without a lease may be well, and only out of the index's sight.
                for host in self._hosts.known([note.host]):
                    known = Snapshot.known(
                        host.stub, note.host, bytes.fromhex(note.snapshot), _place(note)
                    )
                    answer = await call(known)
                    self._given.discard(note.snapshot)
                    return answer
            except (RefusedError, HostAwayError, SamepageError) as error:
                log.info("a host does not answer yet", host=note.host, why=str(error))
                if needed and isinstance(error, RefusedError) and error.args[0] == errno.ENOENT:
                    self._learn_lost(note)
            now = time.monotonic()
            gone_since = None if live else gone_since or now
            silent = gone_since is not None and now - gone_since >= _GONE_SECONDS
            if note.snapshot in self._given or (silent and not needed):
                return None
            if silent and not told:
                told = True
                log.error(
                    "only a host that is away knows whether it left its arena, which waits for it:"
                    " bring it back, or say that it is gone (`samepage forget-host`)",
                    host=note.host,
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_SECONDS_MAX)

    def _learn_lost(self, note: Note) -> None:
        """The source's host says that it will never know what became of the arena."""
        if note.snapshot not in self._lost:
            self._lost.add(note.snapshot)
            log.error(
                "the process that an arena was to come from has ended, and its host has lost what"
                " it knew: if no other host has the arena, say so (`samepage forget-host`)",
                host=note.host,
            )

    async def _sweep_forever(self) -> None:
        """Drop the notes of arenas that have ended."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for key, handover in list(self._by_key.items()):
                note = handover.note
                if note.left and not self._domains.lives(bytes.fromhex(note.domain_id), note.lock):
                    self.forget(key)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a host was not asked to the end", exc_info=error)


def _alive(name: str) -> str:
    return (
        f"host {name!r} is in the cluster, and says itself what became of its arenas as soon as"
        " their processes announce themselves. When such a process has ended for good, its merger"
        " says that, and this command is believed; where it cannot see processes, and when the"
        " whole host is gone, end its merger and scanner first"
    )


def _place(note: Note) -> Place:
    return Place(
        bytes.fromhex(note.source_store),
        bytes.fromhex(note.source_agent),
        note.source_number,
        Process(note.source_pid, note.source_inode, note.source_namespace),
    )


async def _left(snapshot: Snapshot) -> bool:
    left = await snapshot.leave(_ASK_SECONDS)
    failpoint("migrate.left")
    return left


async def _ended(snapshot: Snapshot) -> bool:
    await snapshot.end()
    return True
