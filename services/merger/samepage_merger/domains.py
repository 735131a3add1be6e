"""Domains and their arenas: what the merger knows, and when a slot may be freed.

Rules. The first is the project's: a slot that any living process may still map is never punched.
- What an arena's agent said counts for as long as its connection lasts. When that ends the arena
  goes to limbo: nobody knows what its last orders did, so its references and the slots that its
  orders in flight name stay until its lock is gone (then no process maps the store through that
  descriptor any more), or until it proves the lock and announces itself again.
- An arena maps the store through the one descriptor that its lock is on.
- The same holds for the digests that its orders to evict name: they are pinned until the outcome is
  known, or the arena has announced which of its pages are away.
- What is held for other hosts is noted beside the store, and is in the books from the start on.
- Slots from before this merger's start may be mapped by arenas that have not announced themselves
  yet. So however the books count, such a slot's memory is given back only when every lock that
  stands is one whose arena is known in full. The same goes for what is in the file but not in the
  books, because somebody touched a hole.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np
import structlog

from samepage.daemon import secrets, wire
from samepage.daemon.peers import Outcomes
from samepage_merger.arena import Arena, State
from samepage_merger.books import NO_SLOTS, Books
from samepage_merger.cluster.away import AwayMap, Digests, Pins, no_digests
from samepage_merger.cluster.catalog import Catalog
from samepage_merger.cluster.digests import Digester
from samepage_merger.cluster.holdfile import HoldFile
from samepage_merger.cluster.holds import Holds
from samepage_merger.locks import StoreLocks
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s
from samepage_merger.sharers import Families
from samepage_merger.store import Store, StoreDirectory

log = structlog.get_logger(__name__)


class RefusedError(Exception):
    """A request that cannot be met: `args` are an errno, and a text that says what to do."""


class Domain:
    """One domain: its store, its books, its arenas.

    Args:
        secret: the cluster's.
        hold_file: says which slots are held for other hosts.

    Attributes:
        id: by which other hosts and the index know it.
        name: empty when only its store is known, from before this merger's start.
        families: slots of one content, where one of them was full.
        pins: digests that are kept besides those of away pages.
        digester: makes the digests of its pages.
        catalog: slots by digest.
        holds: what is held for other hosts.
        merged, restored: pages since start.
    """

    def __init__(self, domain_id: bytes, store: Store, secret: bytes, hold_file: HoldFile) -> None:
        self.id = domain_id
        self.name = ""
        self.store = store
        self.locks = StoreLocks(store)
        self.books = Books()
        self.families = Families()
        self.pins = Pins()
        self.arenas: set[Arena] = set()
        self.names: dict[str, Arena] = {}
        self.merged = 0
        self.restored = 0
        self._known_locks: set[int] = set()
        # Slots below may be mapped by arenas that an earlier merger knew, and this one does not.
        self._first_own_slot = store.slots
        self.digester = Digester(secrets.digest_key(secret, domain_id))
        self.catalog = Catalog(self.books, store, self.digester, self.free)
        self.holds = Holds(self.books, self.catalog, hold_file, self.free)
        self.holds.restore(store.slots)

    def claim(self, name: str, agent: bytes, own: Arena | None = None) -> None:
        """Make sure that the agent may use a name for a new arena, or for `own`.

        Raises:
            RefusedError: another arena has it.
        """
        holder = self.names.get(name)
        if holder is None or holder is own:
            return
        if holder.state is State.LIMBO:
            if not self.locks.held(holder.lock):
                self.forget(holder)
                return
            if holder.agent == agent:
                del self.names[name]
                return
        raise RefusedError(
            errno.EEXIST,
            f"an arena named {name!r} exists in domain {self.name!r} on this host: choose another"
            " name, or close that arena first",
        )

    def create(self, agent: bytes, number: int, name: str, pages: int) -> tuple[Arena, int]:
        """Return a new open arena, and the store's descriptor for its agent (to be closed).

        Raises:
            MemoryError: there is no address space for its books.
            OSError: the store cannot be opened.
        """
        away = AwayMap(pages)
        page_map = self.books.open(pages)
        try:
            lock, fd = self.locks.issue()
        except OSError:
            self.books.close(page_map)
            raise
        self._known_locks.add(lock)
        arena = Arena(self, agent, number, name, lock, page_map, away, state=State.OPEN)
        self.arenas.add(arena)
        self.names[name] = arena
        return arena, fd

    def limbo_of(self, agent: bytes, lock: int) -> Arena | None:
        """Return the arena in limbo that has this lock."""
        for arena in self.arenas:
            if arena.state is State.LIMBO and arena.lock == lock and arena.agent == agent:
                return arena
        return None

    def announce(
        self, arena: Arena | None, agent: bytes, number: int, name: str, lock: int, pages: int
    ) -> Arena:
        """Begin to take in what an agent says its arena maps; `arena` is its earlier life.

        Raises:
            MemoryError: there is no address space for its books.
        """
        away = AwayMap(pages)
        page_map = self.books.open(pages)
        if arena is None:
            arena = Arena(self, agent, number, name, lock, page_map, away)
            self.arenas.add(arena)
        else:
            arena.previous.append(arena.map)
            arena.previous_away.append(arena.away)
            arena.map = page_map
            arena.away = away
            arena.number = number
            if self.names.get(arena.name) is arena:
                del self.names[arena.name]
            arena.name = name
        arena.state = State.ANNOUNCING
        self.names[name] = arena
        return arena

    def announced(self, arena: Arena) -> None:
        """All is said: only that counts from now on."""
        for page_map in arena.previous:
            self.free(self.books.close(page_map))
        arena.previous.clear()
        arena.previous_away.clear()
        self._release_stale(arena)
        self._known_locks.add(arena.lock)
        arena.state = State.OPEN

    def extend(self, arena: Arena, pages: Int64s, slots: Int64s) -> None:
        """Take in mappings that an agent announced."""
        self.books.adopt(slots)
        self.free(self.books.map(arena.map, pages, slots))

    def free(self, slots: Int64s) -> None:
        """Give back slots (ascending) that are in the books no more, as far as it is safe now."""
        self.families.forget(slots)
        self.store.free(slots[slots >= self._first_own_slot])

    def hold(self, arena: Arena, slots: Int64s) -> int:
        """Keep slots that an order to this arena names; return the hold."""
        hold = self.books.hold(slots)
        arena.holds.add(hold)
        return hold

    def in_flight(self, slots: Int64s) -> Int64s:
        """Return how many pages may come to map each slot by orders that nobody knows the outcome
        of."""
        holds = [
            self.books.held(hold)
            for arena in self.arenas
            for hold in (*arena.holds, *arena.stale_holds)
        ]
        held = np.sort(np.concatenate([NO_SLOTS, *holds]))
        return np.searchsorted(held, slots, "right") - np.searchsorted(held, slots, "left")

    def release(self, arena: Arena, hold: int) -> None:
        """End the hold of an order that was answered."""
        arena.holds.discard(hold)
        self.free(self.books.release(hold))
        if arena.state is State.CLOSED and not arena.holds and arena.session is not None:
            arena.session.closing.discard(arena)

    def pin(self, arena: Arena, digests: Digests) -> int:
        """Keep digests that an order to this arena names; return the pin."""
        pin = self.pins.keep(digests)
        arena.pins.add(pin)
        return pin

    def unpin(self, arena: Arena, pin: int) -> None:
        """End the pin of an order that was answered."""
        arena.pins.discard(pin)
        arena.stale_pins.discard(pin)
        self.pins.release(pin)

    def replaced(self, arena: Arena, pages: Int64s, slots: Int64s, outcomes: Outcomes) -> None:
        """Apply an order's outcomes."""
        done = outcomes == wire.Outcome.MERGED
        merged = int(np.count_nonzero(done))
        self.merged += merged
        if merged < pages.size:
            pages, slots = pages[done], slots[done]
        if arena.state is not State.CLOSED:
            self.free(self.books.map(arena.map, pages, slots))
            arena.away.remove(pages)

    def evicted(self, arena: Arena, pages: Int64s, digests: Digests, outcomes: Outcomes) -> None:
        """Apply the outcomes of an order to evict: what is away maps no slot any more."""
        done = outcomes == wire.Outcome.MERGED
        if arena.state is not State.CLOSED:
            self.free(self.books.unmap(arena.map, pages[done]))
            arena.away.add(pages[done], digests[done])

    def no_longer_away(self, arena: Arena, pages: Int64s, outcomes: Outcomes) -> None:
        """Apply the outcomes of an order to fill or poison: what it found busy was not away any
        more; with any other outcome but MERGED a page stays away."""
        ended = (outcomes == wire.Outcome.MERGED) | (outcomes == wire.Outcome.BUSY)
        if arena.state is not State.CLOSED:
            arena.away.remove(pages[ended])

    def restore(self, arena: Arena, pages: Int64s) -> None:
        """Pages (each named once) map no slot any more; those that mapped none are ignored."""
        pages = pages[arena.map.slots(pages) != PRIVATE]
        arena.restored += pages.size
        self.restored += pages.size
        self.free(self.books.unmap(arena.map, pages))

    def leave(self, arena: Arena, snapshot: bytes) -> None:
        """The arena was left to another host, with that snapshot: it has no bytes any more."""
        arena.left = snapshot
        self.holds.left(snapshot)
        arena.away.clear()
        self.free(self.books.unmap(arena.map, arena.map.mapped()))

    def close(self, arena: Arena) -> None:
        """The arena maps no slot any more; orders in flight keep their holds."""
        self._drop_maps(arena)
        arena.away.clear()
        arena.previous_away.clear()
        for pin in (*arena.pins, *arena.stale_pins):
            self.unpin(arena, pin)
        arena.state = State.CLOSED
        self.arenas.discard(arena)
        if self.names.get(arena.name) is arena:
            del self.names[arena.name]

    def disconnect(self, arena: Arena) -> None:
        """The agent's connection ended: keep everything until the lock is gone."""
        arena.session = None
        arena.state = State.LIMBO
        arena.stale_holds |= arena.holds
        arena.holds.clear()
        arena.stale_pins |= arena.pins
        arena.pins.clear()
        self.arenas.add(arena)

    def forget(self, arena: Arena) -> None:
        """The arena's lock is gone, and with it every mapping of its process."""
        self._release_stale(arena)
        self.close(arena)

    def announce_away(self, arena: Arena, pages: Int64s, digests: Digests) -> None:
        """Take in away pages that an agent announced."""
        arena.away.add(pages, digests)
        self.pins.note(digests)

    def away(self) -> Digests:
        """Return the digests of all away pages, in no order."""
        maps = [away for arena in self.arenas for away in (arena.away, *arena.previous_away)]
        return np.concatenate([no_digests(), *(away.digests(away.all()) for away in maps)])

    def needed(self) -> Digests:
        """Return the digests that somebody of this host needs from elsewhere, in no order."""
        return np.concatenate([self.away(), self.pins.all()])

    def knows_all(self) -> bool:
        """Return whether no living process has an arena here that has yet to announce itself."""
        return not self.locks.live() - self._known_locks

    def unused(self) -> bool:
        """Return whether no process can map the store, and nothing is held for other hosts."""
        return not (self.locks.live() or len(self.holds))

    def settle(self) -> bool:
        """Free what no living process can map any more; return whether nothing is left waiting."""
        self.holds.expire()
        for arena in [arena for arena in self.arenas if arena.state is State.LIMBO]:
            if not self.locks.held(arena.lock):
                self.forget(arena)
        limbo = any(arena.state is State.LIMBO for arena in self.arenas)
        return self._sweep() and not limbo

    def _sweep(self) -> bool:
        excess = self.store.resident_bytes() - len(self.books.table) * wire.PAGE_SIZE
        if excess <= 0 and not self._first_own_slot:
            return True
        standing = self.locks.live()
        self._known_locks &= standing
        if standing - self._known_locks:
            return excess <= 0
        # A lock of an earlier merger's comes to stand no more.
        self._first_own_slot = 0
        if excess > 0:
            self.store.free_all_but(self.books.table.live())
            log.info("freed slots that nobody maps", domain=self.name, bytes=excess)
        return True

    def _drop_maps(self, arena: Arena) -> None:
        for page_map in (*arena.previous, arena.map):
            self.free(self.books.close(page_map))
        arena.previous.clear()

    def _release_stale(self, arena: Arena) -> None:
        while arena.stale_holds:
            self.free(self.books.release(arena.stale_holds.pop()))
        while arena.stale_pins:
            self.pins.release(arena.stale_pins.pop())


class Domains:
    """All domains of the host.

    Args:
        stores: where their files are.
        secret: the cluster's, from which seeds and ids are derived.

    Attributes:
        store_id: by which other hosts tell this one's store from those of its name.
    """

    def __init__(self, stores: StoreDirectory, secret: bytes) -> None:
        self.store_id = stores.id
        self._stores = stores
        self._secret = secret
        self._domains: dict[bytes, Domain] = {}
        for domain_id in stores.existing():
            self._open(domain_id)

    def __iter__(self) -> Iterator[Domain]:
        return iter(self._domains.values())

    def open(self, name: str) -> Domain:
        """Return a domain by name; made if missing.

        Raises:
            InvalidArgumentError: no domain can have that name.
            OSError: its store cannot be opened.
        """
        domain_id = secrets.domain_id(self._secret, name)
        domain = self._domains.get(domain_id) or self._open(domain_id)
        domain.name = name
        return domain

    def find(self, domain_id: bytes) -> Domain | None:
        """Return a domain by its id, if it has a store here."""
        return self._domains.get(domain_id)

    def lives(self, domain_id: bytes, lock: int) -> bool:
        """Whether a process of this host has the arena with this lock."""
        domain = self._domains.get(domain_id)
        return domain is not None and domain.locks.held(lock)

    def seed(self, domain: Domain) -> int:
        """The seed of a domain's fingerprints; its name must be known."""
        return secrets.domain_seed(self._secret, domain.name)

    def arenas(self) -> Iterator[Arena]:
        """All arenas that have a name, those in limbo too."""
        for domain in self:
            yield from domain.names.values()

    def saved_pages(self) -> int:
        """Return how many pages merging saves."""
        return sum(domain.books.saved_pages() for domain in self)

    def resident_bytes(self) -> int:
        """Bytes of all stores."""
        return self._stores.resident_bytes()

    def close(self) -> None:
        """Close the stores, and remove those that no process can map and no other host needs."""
        for domain in self:
            domain.holds.close()
        self._stores.close(lambda domain_id: self._domains[domain_id].unused())

    def _open(self, domain_id: bytes) -> Domain:
        hold_file = HoldFile(self._stores.holds_path(domain_id))
        domain = Domain(domain_id, self._stores.open(domain_id), self._secret, hold_file)
        self._domains[domain_id] = domain
        return domain
