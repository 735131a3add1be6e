"""Slots that are kept for other hosts: who holds what, and for how long.

Rules.
- A hold is granted only when it is noted in the file beside the store, so a merger that restarts
  keeps it (docs/cluster.md).
- A hold is no reference: the books keep the slot because of it, and count no page that maps it.
- All that is held for an owner by Hold is under one lease; so is what is held for a snapshot, which
  has a lease of its own, so that one whose owner forgot it ends by itself.
- Time is that of the machine since its start, as the store's is: a clock that is set changes
  nothing, nor does a restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import structlog

from samepage_merger.books import NO_SLOTS, Books
from samepage_merger.cluster.away import Mask
from samepage_merger.cluster.catalog import Catalog
from samepage_merger.cluster.holdfile import ENTRY, NO_ENTRIES, HoldFile, Kind, Record
from samepage_merger.cluster.keys import Keys
from samepage_merger.runs import Int64s, unique_first
from samepage_merger.store import StoreFullError

#: No snapshot: what Hold granted.
HELD = bytes(16)
LEASES_MAX = 60_000

_REWRITE_BYTES = 1 << 20

log = structlog.get_logger(__name__)


def _since_start() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def owner_of(host: str, store_id: bytes) -> str:
    """Return by what an owner's leases are known: its host's name, and which of that name it is."""
    return f"{host}#{store_id.hex()}" if store_id else host


def host_of(owner: str) -> tuple[str, bytes]:
    """Return the name of an owner's host, and its store's id."""
    host, _, store_id = owner.partition("#")
    return host, bytes.fromhex(store_id)


class SlotSet:
    """A set of slots, in a few sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._levels: list[Int64s] = []

    def __len__(self) -> int:
        return sum(level.size for level in self._levels)

    def contains(self, slots: Int64s) -> Mask:
        """Return whether each slot is in the set."""
        found = np.zeros(slots.size, np.bool_)
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, slots), level.size - 1)
            found |= level[at] == slots
        return found

    def add(self, slots: Int64s) -> None:
        """Take in slots (ascending) that are not in the set."""
        while self._levels and self._levels[-1].size < 2 * slots.size:
            slots = np.sort(np.concatenate((self._levels.pop(), slots)), kind="stable")
        if slots.size:
            self._levels.append(slots)

    def remove(self, slots: Int64s) -> None:
        """Take out slots."""
        levels = [level[~np.isin(level, slots)] for level in self._levels]
        self._levels = []
        for level in levels:
            self.add(level)

    def all(self) -> Int64s:
        """Return all slots, ascending."""
        return np.sort(np.concatenate([NO_SLOTS, *self._levels]), kind="stable")


@dataclass(eq=False)
class Lease:
    """What one owner, or one snapshot of its, holds.

    Attributes:
        expires: in seconds since the machine's start.
        arena, lock: of which arena a snapshot is; no lock: the arena was left with another one.
    """

    owner: str
    snapshot: bytes = HELD
    expires: float = 0.0
    arena: str = ""
    lock: int = 0
    slots: SlotSet = field(default_factory=SlotSet)


class Holds:
    """The holds of one domain.

    Args:
        catalog: gets the digests of held slots from the file.
        free: gives back slots that are in the books no more.
        now: seconds since the machine's start.
    """

    def __init__(
        self,
        books: Books,
        catalog: Catalog,
        file: HoldFile,
        free: Callable[[Int64s], None],
        now: Callable[[], float] = _since_start,
    ) -> None:
        self._books = books
        self._catalog = catalog
        self._file = file
        self._free = free
        self._now = now
        self._leases: dict[tuple[str, bytes], Lease] = {}

    def __len__(self) -> int:
        """How many slots are held, each as often as it is held."""
        return sum(len(lease.slots) for lease in self._leases.values())

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def restore(self, slots: int) -> None:
        """Take in what the file says; the store has so many slots."""
        granted = [NO_ENTRIES]
        for record in self._file.read():
            name = record.owner, record.snapshot
            if record.kind is Kind.END:
                self._leases.pop(name, None)
                continue
            lease = self._leases.setdefault(name, Lease(*name))
            if record.kind is Kind.LEASE:
                lease.expires, lease.arena, lease.lock = record.expires, record.arena, record.lock
                continue
            named = np.unique(record.entries["slot"].astype(np.int64))
            if record.kind is Kind.RELEASE:
                lease.slots.remove(named)
                continue
            granted.append(record.entries)
            named = named[(named > 0) & (named < slots)]
            lease.slots.add(named[~lease.slots.contains(named)])
        entries = np.concatenate(granted)
        known, at = np.unique(entries["slot"].astype(np.int64), return_index=True)
        for lease in self:
            held = lease.slots.all()
            self._books.adopt(held)
            self._books.keep(held)
            self._catalog.add(entries["key"][at[np.searchsorted(known, held)]], held)
        if self._leases:
            log.info("slots held for other hosts", slots=len(self), leases=len(self._leases))

    def lease(self, owner: str, snapshot: bytes = HELD) -> Lease | None:
        """Return a lease, unless there is none, or it is over."""
        lease = self._leases.get((owner, snapshot))
        return lease if lease is not None and lease.expires > self._now() else None

    def snapshot(self, snapshot: bytes) -> Lease | None:
        """Return the lease of a snapshot, unless there is none, or it is over."""
        for lease in self._leases.values():
            if lease.snapshot == snapshot and lease.expires > self._now():
                return lease
        return None

    def extend(
        self, owner: str, seconds: float, snapshot: bytes = HELD, arena: str = "", lock: int = 0
    ) -> Lease:
        """Let a lease last for so long from now at least; made if missing.

        Raises:
            StoreFullError: that cannot be noted.
        """
        name = owner, snapshot
        lease = self._leases.get(name) or Lease(owner, snapshot, 0.0, arena, lock)
        if name not in self._leases and len(self._leases) >= LEASES_MAX:
            raise StoreFullError
        expires = max(lease.expires, self._now() + seconds)
        self._file.append(_lease_record(lease, expires))
        lease.expires = expires
        self._leases[name] = lease
        self._shorten()
        return lease

    def grant(self, lease: Lease, keys: Keys, slots: Int64s) -> None:
        """Hold live slots, by the keys of their digests; those held already are left out.

        Raises:
            StoreFullError: that cannot be noted; nothing is held.
        """
        slots, at = unique_first(slots)
        new = ~lease.slots.contains(slots)
        slots, keys = slots[new], keys[at[new]]
        if not slots.size:
            return
        self._note(lease, Kind.GRANT, keys, slots)
        self._books.keep(slots)
        lease.slots.add(slots)
        self._catalog.add(keys, slots)

    def release(self, lease: Lease, slots: Int64s) -> None:
        """Hold slots no longer; those that are not held are left out."""
        slots = np.unique(slots)
        slots = slots[lease.slots.contains(slots)]
        if not slots.size:
            return
        if not self._noted(lease, Kind.RELEASE, slots):
            return
        lease.slots.remove(slots)
        self._free(self._books.unkeep(slots))
        self._shorten()

    def end(self, lease: Lease) -> None:
        """Hold nothing of a lease any longer."""
        name = lease.owner, lease.snapshot
        if self._leases.get(name) is not lease:
            return
        lease.expires = 0.0
        if not self._noted(lease, Kind.END, NO_SLOTS):
            return
        del self._leases[name]
        self._free(self._books.unkeep(lease.slots.all()))
        self._shorten()

    def left(self, snapshot: bytes) -> None:
        """An arena was left with a snapshot: with no other one it can be left any more, though all
        hold what they hold."""
        mine = self.snapshot(snapshot)
        if mine is None or not mine.lock:
            return
        for lease in self:
            if lease is mine or lease.lock != mine.lock:
                continue
            lease.lock = 0
            try:
                self._file.append(_lease_record(lease, lease.expires))
            except StoreFullError:
                log.warning("no room to note which snapshot an arena was left with")

    def keep(self, snapshot: Lease) -> None:
        """Let what a snapshot holds be held for its owner as by Hold, and end the snapshot.

        Raises:
            StoreFullError: that cannot be noted; nothing has changed.
        """
        slots = snapshot.slots.all()
        lease = self.extend(snapshot.owner, max(0.0, snapshot.expires - self._now()))
        self.grant(lease, self._catalog.keys(slots), slots)
        self.end(snapshot)

    def expire(self) -> None:
        """End the leases that are over."""
        now = self._now()
        for lease in self:
            if lease.expires <= now:
                log.info(
                    "a lease is over", owner=lease.owner, slots=len(lease.slots), arena=lease.arena
                )
                self.end(lease)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _note(self, lease: Lease, kind: Kind, keys: Keys, slots: Int64s) -> None:
        entries = np.empty(slots.size, ENTRY)
        entries["key"], entries["slot"] = keys, slots
        self._file.append(Record(kind, lease.owner, lease.snapshot, entries=entries))

    def _noted(self, lease: Lease, kind: Kind, slots: Int64s) -> bool:
        """Note that slots are not held any more; False where there is no room for that.

        What the file says is held must not be freed, so it is kept until the lease is over.
        """
        try:
            self._note(lease, kind, np.zeros(slots.size, np.uint64), slots)
        except StoreFullError:
            log.warning("no room to note that slots are not held any more", slots=slots.size)
            return False
        return True

    def _shorten(self) -> None:
        if self._file.size > _REWRITE_BYTES + 4 * ENTRY.itemsize * len(self):
            self._file.rewrite(self._records())

    def _records(self) -> Iterator[Record]:
        for lease in self:
            yield _lease_record(lease, lease.expires)
            slots = lease.slots.all()
            entries = np.empty(slots.size, ENTRY)
            entries["key"], entries["slot"] = self._catalog.keys(slots), slots
            yield Record(Kind.GRANT, lease.owner, lease.snapshot, entries=entries)


def _lease_record(lease: Lease, expires: float) -> Record:
    return Record(Kind.LEASE, lease.owner, lease.snapshot, expires, lease.arena, lease.lock)
