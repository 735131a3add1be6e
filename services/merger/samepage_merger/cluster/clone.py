"""Makes arenas that are copies of other hosts': the destination's side of clone (docs/cluster.md).

Theory. An agent asks (CLONE), and a task of its own works it off: the source makes a snapshot and
tells of its pages, stretch by stretch. As soon as it is known how many there are the agent makes
the arena, in which nobody can look yet. The pages of each stretch that hold more than zeros land
(landing.py) while the next stretch is on its way; those of lazy clones and migrations, which are
told of more than once, or are seen before they are here, are made away pages first. When the last
has landed the agent is told, and the application has the arena.

Whatever goes wrong before ends the task, and with it everything: the agent is refused and drops the
arena, slots that no page maps are freed, the source forgets its snapshot. What was begun is noted
in a file, so that a merger that restarts tells the source.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from samepage.daemon import secrets, wire
from samepage.daemon.failpoints import failpoint
from samepage.errors import InvalidArgumentError, SamepageError
from samepage_merger.arena import Arena, Session
from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import are_zero
from samepage_merger.cluster.groups import GROUP_PAGES
from samepage_merger.cluster.handover import HandOver, HandOvers, Hosts, Key
from samepage_merger.cluster.hosts import HostAwayError
from samepage_merger.cluster.journal import Journal, Note
from samepage_merger.cluster.landing import Chunk, Landing, Tools, check, distinct
from samepage_merger.cluster.migrate import Migration
from samepage_merger.cluster.source import Snapshot, Stretch, gathered
from samepage_merger.domains import Domain, Domains, RefusedError
from samepage_merger.pagemap import PRIVATE

_PROGRESS_SECONDS = 0.1
_OPEN_SECONDS = 30.0
# Of the lease of a snapshot, within its length.
_RENEWALS = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Services:
    """What clones need.

    Attributes:
        node: this host's name.
        lease_seconds: how long other hosts keep pages for this one unless it renews that.
        exempt: arenas whose pages are on their way, and are nobody else's business.
        granted: told which digests another host holds for this one.
    """

    node: str
    hosts: Hosts
    tools: Tools
    domains: Domains
    journal: Journal
    lease_seconds: float = 3600.0
    exempt: set[Arena] = field(default_factory=set)
    granted: Callable[[Domain, str, Digests], object] = lambda domain, host, digests: None


class Clones:
    """All clones and migrations under way, by agent and number of the arena.

    Args:
        handovers: those that came to the point where the source was asked to leave.
    """

    def __init__(self, services: Services, handovers: HandOvers) -> None:
        self._services = services
        self._handovers = handovers
        self._clones: dict[Key, Clone] = {}
        self._tasks: dict[asyncio.Task[None], Key] = {}

    def __len__(self) -> int:
        return len(self._clones)

    def clone(self, session: Session, message: wire.Message) -> None:
        """Begin what an agent asks for; what stands in the way it is told later.

        Raises:
            ProtocolError: it makes no sense.
        """
        wanted = wire.unpack_clone(message)
        key = session.peer.agent, message.arena
        if message.arena == 0 or key in self._clones:
            raise wire.ProtocolError(f"CLONE of arena {message.arena}")
        clone = Clone(self._services, self._handovers, session, message, wanted)
        self._clones[key] = clone
        task = asyncio.ensure_future(clone.run())
        self._tasks[task] = key
        task.add_done_callback(self._ended)

    def opened(self, session: Session, arena: Arena) -> None:
        """An agent has made an arena, maybe one that a clone waits for."""
        clone = self._clones.get((session.peer.agent, arena.number))
        if clone is not None:
            clone.opened(arena)

    def closed(self, session: Session, number: int) -> None:
        """An agent has closed an arena, or cannot make it: it gives up."""
        key = session.peer.agent, number
        self._handovers.forget(key)
        self._cancel(key)

    def disconnected(self, session: Session) -> None:
        """An agent's connection has ended."""
        for key in list(self._clones):
            if key[0] == session.peer.agent:
                self._cancel(key)

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _cancel(self, key: Key) -> None:
        self._clones.pop(key, None)
        for task, number in self._tasks.items():
            if number == key:
                task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        key = self._tasks.pop(task)
        if key not in self._tasks.values():
            self._clones.pop(key, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a clone failed", exc_info=error)


class Clone:
    """One clone or migration, from the agent's request to its answer."""

    def __init__(
        self,
        services: Services,
        handovers: HandOvers,
        session: Session,
        message: wire.Message,
        wanted: wire.Clone,
    ) -> None:
        self._services = services
        self._handovers = handovers
        self._session = session
        self._message = message
        self._wanted = wanted
        self._arena: asyncio.Future[Arena] = asyncio.get_running_loop().create_future()
        self._pages = 0
        self._zero = 0
        self._target: Arena | None = None
        self._landing: Landing | None = None
        self._lazy: list[Chunk] = []
        self._sealed = False
        # Of the snapshot that is to be ended when this ends.
        self._note: Note | None = None

    def opened(self, arena: Arena) -> None:
        """The agent has made the arena."""
        if not self._arena.done():
            self._arena.set_result(arena)

    async def run(self) -> None:
        """Do it, and tell the agent what became of it."""
        peer, message = self._session.peer, self._message
        try:
            freeze_us = await self._made()
        except RefusedError as refused:
            peer.refuse(message, *refused.args)
        except InvalidArgumentError as error:
            peer.refuse(message, errno.EINVAL, str(error))
        except HostAwayError as error:
            peer.refuse(message, errno.EAGAIN, str(error))
        except (SamepageError, MemoryError, OSError) as error:
            log.warning("a clone failed", why=str(error))
            peer.refuse(message, getattr(error, "errno", None) or errno.EIO, str(error))
        except Exception:
            peer.refuse(message, errno.EIO, "the merger failed: see its log")
            raise
        else:
            payload = wire.CLONED.pack(*self._counts(), freeze_us, self._sealed)
            peer.send(wire.Type.CLONED, message.seq, message.arena, payload)
            failpoint("clone.told")
            if self._wanted.lazy and self._landing is not None:
                await self._bring(self._landing)

    async def _made(self) -> int:
        """Make the arena; return for how long its writers had to wait, in microseconds."""
        key = self._session.peer.agent, self._message.arena
        if (arena := self._session.arenas.get(key[1])) is not None:
            return await self._asked_again(key, arena)
        wanted = self._wanted
        failpoint("clone.asked")
        domain = self._checked_domain()
        services = self._services
        host = await services.hosts.find(wanted.host)
        if host is None:
            text = f"no host {wanted.host!r} is in the cluster now: see `samepage status`"
            raise RefusedError(errno.ENOENT, text)
        snapshot = Snapshot(
            host.stub,
            wanted.host,
            domain.id,
            wanted.source,
            services.node,
            services.lease_seconds,
            services.domains.store_id,
        )
        return await self._from(snapshot)

    async def _asked_again(self, key: Key, arena: Arena) -> int:
        """Return the same for a migration whose connection ended before its answer."""
        known = self._handovers.find(key)
        if known is None:
            raise RefusedError(errno.ENOENT, _UNKNOWN)
        self._pages = self._zero = arena.pages
        return await self._result(known)

    def _checked_domain(self) -> Domain:
        wanted = self._wanted
        if wanted.host == self._services.node:
            text = f"{wanted.source!r} is on this host already: name another host"
            raise RefusedError(errno.EINVAL, text)
        if wanted.migrate and (wanted.lazy or not wanted.max_freeze_ms):
            text = "a migration cannot be lazy, and needs a longest freeze of 1 ms or more"
            raise RefusedError(errno.EINVAL, text)
        secrets.check_name(wanted.source)
        secrets.check_name(wanted.name)
        domain = self._services.domains.open(wanted.domain)
        domain.claim(wanted.name, self._session.peer.agent)
        return domain

    async def _from(self, snapshot: Snapshot) -> int:
        telling = asyncio.ensure_future(self._tell_forever())
        renewing = asyncio.ensure_future(self._renew_forever(snapshot))
        try:
            offer = not (self._wanted.lazy or self._wanted.migrate)
            async with contextlib.aclosing(snapshot.round(offer=offer)) as stretches:
                first = await anext(stretches)
                self._note = Note(snapshot.host, snapshot.id.hex())
                self._services.journal.write(self._note)
                failpoint("clone.snapshot")
                arena = await self._open_arena(snapshot.pages)
                landing = self._landing = Landing(
                    self._services.tools, arena, snapshot.host, fresh=offer
                )
                await self._take_in(arena, snapshot, first, landing)
                async for stretch in gathered(stretches):
                    await self._take_in(arena, snapshot, stretch, landing)
            failpoint("clone.away")
            self._sealed = snapshot.sealed
            if self._wanted.lazy:
                await snapshot.end(keep_holds=True)
                for chunk in self._lazy:
                    digests = chunk.digests[distinct(chunk.digests)[0]]
                    self._services.granted(arena.domain, snapshot.host, digests)
                return 0
            await landing.finish()
            if self._wanted.migrate:
                return await self._hand_over(snapshot, arena, landing)
            _check_complete(arena)
            self._check_counts()
            failpoint("clone.whole")
            return 0
        finally:
            telling.cancel()
            renewing.cancel()
            if self._target is not None:
                self._services.exempt.discard(self._target)
            if self._landing is not None and not self._wanted.lazy:
                await self._landing.stop()
            if self._note is not None:
                self._handovers.end(self._note)

    async def _hand_over(self, snapshot: Snapshot, arena: Arena, landing: Landing) -> int:
        """Have the source leave; return for how long its writers had to wait."""
        seconds = self._wanted.max_freeze_ms / 1000
        migration = Migration(self._services.tools.orders, snapshot, arena, landing, seconds)
        await migration.settle()
        frozen_at = await migration.freeze()
        _check_complete(arena)
        note = Note(
            snapshot.host,
            snapshot.id.hex(),
            arena.agent.hex(),
            arena.domain.id.hex(),
            arena.number,
            arena.lock,
            sealed=snapshot.sealed,
            source_store=snapshot.place.store_id.hex(),
            source_agent=snapshot.place.agent.hex(),
            source_number=snapshot.place.arena,
            source_pid=snapshot.place.process.pid,
            source_inode=snapshot.place.process.inode,
            source_namespace=snapshot.place.process.namespace,
        )
        handover = self._handovers.begin(note, frozen_at)
        # From here on it is not this task's any more.
        self._note = None
        return await self._result(handover)

    async def _result(self, handover: HandOver) -> int:
        note = await handover.result()
        self._sealed = note.sealed
        return note.freeze_us

    async def _open_arena(self, pages: int) -> Arena:
        """Have the agent make the arena, with so many absent pages."""
        self._pages = pages
        self._tell()
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                arena = await self._arena
        except TimeoutError:
            raise RefusedError(errno.ETIMEDOUT, "this process did not make the arena") from None
        if arena.pages != pages or arena.name != self._wanted.name:
            raise RefusedError(errno.EPROTO, "this process made another arena than it asked for")
        self._target = arena
        self._services.exempt.add(arena)
        failpoint("clone.opened")
        return arena

    async def _take_in(
        self, arena: Arena, snapshot: Snapshot, stretch: Stretch, landing: Landing
    ) -> None:
        """Have the stretch's pages land; let them be away where somebody may look before."""
        if not len(stretch.digests):
            return
        chunk = Chunk(stretch.pages, stretch.digests, stretch.fingerprints)
        if len(stretch.groups):
            groups = await self._map_groups(arena, stretch, landing)
            chunk = await snapshot.describe(stretch, groups)
        zero = are_zero(chunk.digests)
        self._zero += int(np.count_nonzero(zero))
        chunk = chunk[~zero]
        if not landing.fresh:
            check(await self._services.tools.orders.away(arena, chunk.pages, chunk.digests))
        if self._wanted.lazy:
            self._lazy.append(chunk)
        elif stretch.offered:
            await landing.take(chunk, functools.partial(snapshot.taken, stretch.first))
        else:
            await landing.take(chunk)

    async def _map_groups(self, arena: Arena, stretch: Stretch, landing: Landing) -> Mask:
        """Map the groups of a stretch that are known; return which are not."""
        pages = stretch.pages
        with arena.domain.catalog.groups.found(stretch.groups) as known:
            slots = known.slots[: pages.size]
            here = slots != PRIVATE
            await landing.map_slots(pages[here], slots[here])
        of_known = np.repeat(known.mask, GROUP_PAGES)[: pages.size]
        self._zero += int(np.count_nonzero(of_known & ~here))
        return ~known.mask

    def _check_counts(self) -> None:
        """See that every page was told of, and has landed or holds only zeros.

        Raises:
            RefusedError: one has not.
        """
        pages, local, fetched, _ = self._counts()
        if pages != self._zero + local + fetched:
            text = f"of {pages} pages {self._zero + local + fetched} came: try again"
            raise RefusedError(errno.EAGAIN, text)

    async def _bring(self, landing: Landing) -> None:
        """Bring the pages of a lazy clone, which the application has already."""
        try:
            for chunk in self._lazy:
                await landing.take(chunk)
            await landing.finish()
        except RefusedError as refused:
            log.info("the pages of a lazy clone come as they are touched", why=refused.args[1])
        finally:
            await landing.stop()

    async def _tell_forever(self) -> None:
        """Tell the agent how far it is, whenever that has changed."""
        told = self._counts()
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            if self._pages and self._counts() != told:
                told = self._counts()
                self._tell()

    async def _renew_forever(self, snapshot: Snapshot) -> None:
        """Have the source keep the snapshot for as long as this takes."""
        while True:
            await asyncio.sleep(self._services.lease_seconds / _RENEWALS)
            try:
                await snapshot.renew()
            except RefusedError as refused:
                log.info("a snapshot could not be renewed", why=refused.args[1])

    def _tell(self) -> None:
        peer, message = self._session.peer, self._message
        payload = wire.CLONING.pack(*self._counts())
        peer.send(wire.Type.CLONING, message.seq, message.arena, payload)

    def _counts(self) -> tuple[int, int, int, int]:
        """Pages in all, here already, fetched, missing; what is left over holds only zeros."""
        landing = self._landing
        local, fetched = (landing.mapped, landing.fetched) if landing is not None else (0, 0)
        return self._pages, local, fetched, max(0, self._pages - self._zero - local - fetched)


def _check_complete(arena: Arena) -> None:
    """See that no page is away.

    Raises:
        RefusedError: one is.
    """
    if arena.away.away:
        text = f"{arena.away.away} pages could not be mapped: try again"
        raise RefusedError(errno.EAGAIN, text)


_UNKNOWN = "the merger has started anew since: nothing is left of the migration here"
