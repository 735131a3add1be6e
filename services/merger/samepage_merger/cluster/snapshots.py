"""Snapshots of arenas for other hosts, and the end of a migration (docs/cluster.md).

Theory. A snapshot remembers of each page in which slot the bytes are that its owner was told of,
and holds those slots. A page that still maps that slot was not written since; one that maps another
was. A private page may be written at any time without a word, so each round looks at all of them:
it reads them, gives them slots and has the arena map these. What cannot be mapped (pinned for I/O,
or no mapping is left) has its copy in a slot all the same, and is looked at again in every round;
so is a page that is absent, since nobody says when it is touched first.

Whoever needs each page once, and at once, is offered it (offers.py): then nothing of the arena
changes, no page gets a slot, and there is but one round.

Freezing stops all writers, and touches of absent pages, at once; only devices go on writing the
pages that are pinned for them. So each page is told of once more, in a freeze, and mapped. When all
are shared or absent, nobody can write. That is what Leave rests on, and it is the agent that
decides: it leaves only while it is frozen. Whether it has left is known from its answer, from what
it announces after a broken connection, or from its lock being gone, and its process with it; until
then nobody says.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import structlog

from samepage.daemon.failpoints import failpoint
from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena, State
from samepage_merger.cluster.away import Bytes, Digests, Mask, no_digests
from samepage_merger.cluster.digests import Fingerprints, are_zero, parse_fingerprints
from samepage_merger.cluster.fetch import Fetcher
from samepage_merger.cluster.holds import Lease
from samepage_merger.cluster.keys import keys_of
from samepage_merger.cluster.local import Local
from samepage_merger.cluster.looking import Looker, Step
from samepage_merger.cluster.offers import Offers, stretch_end
from samepage_merger.cluster.place import NOWHERE, Place
from samepage_merger.cluster.process import has_ended
from samepage_merger.cluster.promoting import Promoter
from samepage_merger.cluster.snapshot_errors import (
    EndedError,
    NoAnswerError,
    NoArenaError,
    NotPossibleError,
    TooLateError,
    no_answer,
)
from samepage_merger.domains import Domain, Domains
from samepage_merger.orders import Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, join
from samepage_merger.store import LIFE_BYTES

FREEZE_MS_MAX = 60_000

_NEVER = 0
_BLOCK_PAGES = 1 << 16
# What is done for each step costs much the same, however long it is.
_STEP_PAGES = 2048
_PINNED_LOOKS = 20
_PAUSE_SECONDS = 0.002
_LEFT_SECONDS = 86_400.0
# How often an owner hears that the snapshot is there, while it takes what was offered.
_ALIVE_SECONDS = 5.0
_NO_FINGERPRINTS = parse_fingerprints(b"")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive pages of an arena, as the owner is told of them."""

    first_page: int
    digests: Digests
    fingerprints: Fingerprints


@dataclass(eq=False)
class Snapshot:
    """One snapshot.

    Attributes:
        lease: what is held for it.
        told: of each page, 1 + the slot that has the bytes that the owner was told of (1 for
            zeros), or _NEVER.
        turn: held by the round that is under way.
        offers: what is offered instead of being held; None: nothing is.
        grouped: whether the owner is told of groups of pages.
    """

    id: bytes
    arena: Arena
    lease: Lease
    told: Int64s
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    offers: Offers | None = None
    grouped: bool = False

    def taken(self, first_page: int) -> None:
        """Offer a stretch no longer."""
        if self.offers is not None:
            self.offers.taken(first_page)


class Snapshots:
    """All snapshots of this host's arenas.

    Args:
        local, fetcher: bring back pages that are away.
    """

    def __init__(
        self, domains: Domains, orders: Orders, promoter: Promoter, local: Local, fetcher: Fetcher
    ) -> None:
        self._domains = domains
        self._orders = orders
        self._looker = Looker(domains, orders, promoter, local, fetcher)
        self._snapshots: dict[bytes, Snapshot] = {}

    def begin(
        self, domain_id: bytes, name: str, owner: str, seconds: float, *, offer: bool = False
    ) -> Snapshot:
        """Return a new snapshot of an arena; nothing of it is frozen yet.

        Args:
            offer: offer what the arena has, rather than hold it.

        Raises:
            NoArenaError, NoAnswerError: there is none, or its process is away.
            StoreFullError: there is no room to note it.
        """
        domain = self._domains.find(domain_id)
        arena = domain.names.get(name) if domain is not None else None
        if domain is None or arena is None or any(arena.left):
            raise NoArenaError(f"there is no arena {name!r} of that domain on this host")
        if arena.state is not State.OPEN:
            raise NoAnswerError(f"the process of arena {name!r} is not connected: ask again")
        number = os.urandom(16)
        lease = domain.holds.extend(owner, seconds, number, arena.name, arena.lock)
        failpoint("snapshot.begun")
        offers = Offers() if offer else None
        snapshot = Snapshot(number, arena, lease, np.zeros(arena.pages, np.int64), offers=offers)
        self._forget_those_that_are_over()
        self._snapshots[number] = snapshot
        return snapshot

    def find(self, number: bytes, seconds: float = 0.0) -> Snapshot:
        """Return a snapshot, whose lease lasts for so long from now at least.

        Raises:
            NoArenaError: there is none of that number, or not any more.
            StoreFullError: there is no room to note it.
        """
        self._forget_those_that_are_over()
        snapshot = self._snapshots.get(number)
        if snapshot is None:
            raise NoArenaError("there is no such snapshot, or its lease is over: begin a new one")
        lease = snapshot.lease
        snapshot.arena.domain.holds.extend(lease.owner, seconds, lease.snapshot)
        return snapshot

    async def tell(self, snapshot: Snapshot) -> AsyncGenerator[Stretch, None]:
        """Yield what was written since the last time, at first everything; all of it is held, or
        offered, and then it ends when everything was taken.

        Raises:
            NoAnswerError: the arena's process does not answer, or hosts that have pages of it.
            StoreFullError: the store has no room.
        """
        offers = snapshot.offers
        told = self._round(snapshot) if offers is None else self._offered(snapshot, offers)
        async with snapshot.turn, aclosing(told) as stretches:
            async for stretch in stretches:
                yield stretch

    @contextmanager
    def offered(self, domain: Domain, digests: Digests) -> Iterator[Sequence[Bytes] | None]:
        """Give pages that one stretch offers, in order and in parts; None unless it has all.

        The parts stay as they are for as long as the block runs.
        """
        for snapshot in self._snapshots.values():
            if snapshot.offers is not None and snapshot.arena.domain is domain:
                with snapshot.offers.find(digests) as pages:
                    if pages is not None:
                        yield pages
                        return
        yield None

    async def freeze(self, snapshot: Snapshot, milliseconds: int) -> AsyncGenerator[Stretch, None]:
        """Stop the writers for so long at most, and yield what was written since the last time.

        Nobody can write the arena when this has ended without an error, until the time is over.

        Raises:
            As `tell`, and TooLateError, NotPossibleError: pages stay pinned for I/O.
        """
        arena = snapshot.arena
        async with snapshot.turn:
            deadline = time.monotonic() + milliseconds / 1000
            arena.frozen_until = deadline
            try:
                await self._order_freeze(arena, milliseconds)
                failpoint("snapshot.frozen")
                async with aclosing(self._round(snapshot, deadline)) as stretches:
                    async for stretch in stretches:
                        yield stretch
            except BaseException:
                arena.frozen_until = 0.0
                await asyncio.shield(self._orders.freeze(arena, 0))
                raise

    async def leave(self, number: bytes, place: Place = NOWHERE) -> bool:
        """Let the arena of a snapshot be left to the owner; return whether it was.

        Args:
            place: where the owner was told that the arena is.

        Raises:
            NoAnswerError: that is not known yet.
        """
        for domain in self._domains:
            if any(arena.left == number for arena in domain.arenas):
                return True
        snapshot = self._snapshots.get(number)
        lease = snapshot.lease if snapshot is not None else self._noted(number)
        if lease is None:
            return self._unknown_left(place)
        if snapshot is not None and snapshot.arena.state is State.OPEN:
            async with snapshot.turn:
                failpoint("snapshot.leaving")
                left = await self._orders.leave(snapshot.arena, number)
            failpoint("snapshot.left")
            if left:
                # Its owner may take long to hear of it, and asks again.
                snapshot.arena.domain.holds.extend(lease.owner, _LEFT_SECONDS, number)
            if left is not None:
                return left
        return self._left(lease)

    async def end(self, number: bytes, keep_holds: bool) -> None:
        """End a snapshot; one that is not known is no error.

        Args:
            keep_holds: let what it holds be held for its owner from now on.

        Raises:
            StoreFullError: there is no room to note that.
        """
        snapshot = self._snapshots.get(number)
        if snapshot is not None and snapshot.arena.frozen_until > time.monotonic():
            snapshot.arena.frozen_until = 0.0
            await self._orders.freeze(snapshot.arena, 0)
        for domain in self._domains:
            lease = domain.holds.snapshot(number)
            if lease is not None and keep_holds:
                domain.holds.keep(lease)
            elif lease is not None:
                domain.holds.end(lease)
        self._snapshots.pop(number, None)
        failpoint("snapshot.ended")

    async def _offered(self, snapshot: Snapshot, offers: Offers) -> AsyncGenerator[Stretch, None]:
        """Yield everything; a stretch is read while the one before is told of."""
        first = 0
        ahead = asyncio.ensure_future(self._offer(snapshot, offers, first))
        try:
            while True:
                await asyncio.wait({ahead}, timeout=_ALIVE_SECONDS)
                if not ahead.done():
                    yield Stretch(first, no_digests(), _NO_FINGERPRINTS)
                    continue
                stretch = ahead.result()
                if stretch is None:
                    return
                first = stretch_end(first, snapshot.arena.pages)
                ahead = asyncio.ensure_future(self._offer(snapshot, offers, first))
                yield stretch
        finally:
            ahead.cancel()
            await asyncio.wait({ahead})
            offers.clear()

    async def _offer(self, snapshot: Snapshot, offers: Offers, first: int) -> Stretch | None:
        """Read and offer a stretch when there is room; None at the end, when all were taken."""
        arena = snapshot.arena
        if first >= arena.pages:
            await offers.all_taken()
            return None
        data = await offers.buffer()
        pages = np.arange(first, stretch_end(first, arena.pages))
        digests, prints = await self._looker.read(arena, pages, data)
        failpoint("snapshot.read")
        _check_lease(snapshot)
        offers.add(first, digests, prints, data)
        failpoint("snapshot.offered")
        return Stretch(first, digests, prints)

    async def _round(
        self, snapshot: Snapshot, deadline: float | None = None
    ) -> AsyncGenerator[Stretch, None]:
        """Yield what changed; with a deadline, leave no page that can be written unnoticed."""
        arena = snapshot.arena
        for low in range(0, arena.pages, _BLOCK_PAGES):
            block = np.arange(low, min(arena.pages, low + _BLOCK_PAGES))
            slots = arena.map.slots(block)
            changed = block[(slots == PRIVATE) | (slots + 1 != snapshot.told[block])]
            for start in range(0, changed.size, _STEP_PAGES):
                pages = changed[start : start + _STEP_PAGES]
                step, told = await self._step(snapshot, pages)
                if deadline is not None:
                    step, told = await self._settled(snapshot, step, told, deadline)
                for stretch in _stretches(step, told):
                    yield stretch
        if deadline is not None:
            _check_time(deadline)

    async def _settled(
        self, snapshot: Snapshot, step: Step, told: Mask, deadline: float
    ) -> tuple[Step, Mask]:
        """Look at frozen pages until none of them is pinned, or busy, any more."""
        for again in itertools.count():
            _check_time(deadline)
            if not step.loose.size:
                break
            if again >= _PINNED_LOOKS:
                raise NotPossibleError(_why_loose(step.loose))
            await asyncio.sleep(_PAUSE_SECONDS)
            step, told_now = await self._step(snapshot, step.pages)
            told = told | told_now
        return step, told

    async def _step(self, snapshot: Snapshot, pages: Int64s) -> tuple[Step, Mask]:
        """Look at pages, and hold them; return which of them the owner is to be told of."""
        async with AsyncExitStack() as stack:
            step = await self._looker.look(stack, snapshot.arena, pages)
            failpoint("snapshot.looked")
            told = await self._hold(snapshot, step)
        failpoint("snapshot.held")
        return step, told

    async def _hold(self, snapshot: Snapshot, step: Step) -> Mask:
        """Hold what the owner has to be told of; return which of the step's pages that are."""
        domain = snapshot.arena.domain
        before = snapshot.told[step.pages]
        zeros = are_zero(step.digests)
        same = zeros & (before == PRIVATE + 1)
        maybe = np.flatnonzero(~zeros & (before > PRIVATE + 1))
        same[maybe] = await domain.catalog.verify(step.digests[maybe], before[maybe] - 1)
        new = ~same & ~zeros
        holds = domain.holds
        _check_lease(snapshot)
        holds.grant(snapshot.lease, keys_of(step.digests[new]), step.slots[new])
        # A page that has its bytes still, in another slot, is not told of, but known by that slot.
        known = ~same | (step.mapped & ~zeros)
        snapshot.told[step.pages[known]] = step.slots[known] + 1
        told: Mask = ~same
        return told

    async def _order_freeze(self, arena: Arena, milliseconds: int) -> None:
        outcome = await self._orders.freeze(arena, milliseconds)
        if outcome == Outcome.UNSUPPORTED:
            raise NotPossibleError(
                f"the process of arena {arena.name!r} cannot freeze it: its library, or its kernel,"
                " is too old, or it has mapped a file into it"
            )
        if outcome != Outcome.MERGED:
            raise no_answer(arena)

    def _left(self, lease: Lease) -> bool:
        """Return whether an arena was left, by what its process announced, or its end."""
        for domain in self._domains:
            if domain.holds.snapshot(lease.snapshot) is not lease:
                continue
            if not lease.lock:
                return False
            mine = [arena for arena in domain.arenas if arena.lock == lease.lock]
            held = domain.locks.held(lease.lock)
            if mine and mine[0].state is State.OPEN:
                if mine[0].leaving is not None and mine[0].leaving is mine[0].session:
                    raise no_answer(mine[0])
                return mine[0].left == lease.snapshot
            if held:
                raise NoAnswerError(f"the process of arena {lease.arena!r} has yet to announce it")
            # Its process is gone, and no other one may have taken the name over.
            return lease.arena not in domain.names or domain.names[lease.arena] in mine
        return self._unknown_left(NOWHERE)

    def _unknown_left(self, place: Place) -> bool:
        """Return whether an arena was left of whose snapshot nothing is known here."""
        if place.store_id[:LIFE_BYTES] not in (b"", self._domains.store_id[:LIFE_BYTES]):
            # The machine has started anew: whatever ran there is gone.
            return True
        if place.store_id not in (b"", self._domains.store_id):
            # Nor of its lock: that was in a store that is gone. Its process alone can tell.
            arenas = [arena for domain in self._domains for arena in domain.arenas]
            if any(arena.state is State.OPEN and place.is_of(arena) for arena in arenas):
                return False
            if has_ended(place.process):
                raise EndedError(
                    "the arena's process has ended, and whom it had left it to was noted in a store"
                    " that is gone"
                )
        elif all(domain.knows_all() for domain in self._domains):
            return False
        raise NoAnswerError("processes of this host have yet to announce their arenas: ask again")

    def _noted(self, number: bytes) -> Lease | None:
        leases = (domain.holds.snapshot(number) for domain in self._domains)
        return next((lease for lease in leases if lease is not None), None)

    def _forget_those_that_are_over(self) -> None:
        for number, snapshot in list(self._snapshots.items()):
            holds = snapshot.arena.domain.holds
            if holds.snapshot(number) is not snapshot.lease and not snapshot.turn.locked():
                del self._snapshots[number]


def _stretches(step: Step, told: Mask) -> Iterator[Stretch]:
    """Return the stretches of those pages that were told of."""
    at = np.flatnonzero(told)
    first, count = join(step.pages[at])
    ends = np.cumsum(count)
    for page, size, end in zip(first.tolist(), count.tolist(), ends.tolist(), strict=True):
        part = at[end - size : end]
        yield Stretch(page, step.digests[part], step.fingerprints[part])


def _check_lease(snapshot: Snapshot) -> None:
    if snapshot.arena.domain.holds.snapshot(snapshot.id) is not snapshot.lease:
        raise NoArenaError("the snapshot's lease is over: begin a new one")


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TooLateError("the arena could not be told of within the time of its freeze")


def _why_loose(why: Outcomes) -> str:
    if bool((why == Outcome.NO_MAPPING).any()):
        return "the arena's process has no mappings left: raise vm.max_map_count"
    return f"{why.size} pages stay pinned for I/O, or busy: end that I/O, and try again"
