"""A cap on how many pages map one slot (the policy `sharers_max`).

Theory. Orders let no page join a slot that is full: pages that map it and those that orders in
flight name count alike, so that the cap holds whatever runs side by side. What is refused goes on
in another slot with the same bytes. The slots of one content are a family, and the newest of it is
the only one that may have room: pages are tried there first, then every n-th gets a fresh slot with
its own bytes, compared with the full one's, and those after it follow. So N equal pages with a cap
of n are in ceil(N / n) slots. One at a time goes through here, else two would both make the slot
that one of them needs.

Families are known from the first full slot on, until the merger ends; after that a content whose
slots are full goes on in a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire
from samepage.daemon.peers import Outcomes
from samepage.daemon.wire import Outcome
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, ranks
from samepage_merger.store import StoreFullError

if TYPE_CHECKING:
    from samepage_merger.arena import Arena
    from samepage_merger.domains import Domain
    from samepage_merger.orders import Orders

#: Outcome of a page whose slot has as many sharers as it may have.
FULL = 0xFF

_STEP_PAGES = 512

Mask = npt.NDArray[np.bool_]


class Families:
    """Slots that have the same bytes since one of them was full. Takes nothing without a cap."""

    def __init__(self) -> None:
        self._families: dict[int, int] = {}
        self._newest: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._families)

    def of(self, slots: Int64s) -> Int64s:
        """Return the family of each slot, by the number of its first one."""
        return np.array([self._families.get(slot, slot) for slot in slots.tolist()], np.int64)

    def newest(self, slots: Int64s) -> Int64s:
        """Return the newest slot of each one's family; the slot itself where there is none."""
        families = self.of(slots).tolist()
        pairs = zip(families, slots.tolist(), strict=True)
        return np.array([self._newest.get(family, slot) for family, slot in pairs], np.int64)

    def add(self, full: Int64s, fresh: Int64s) -> None:
        """Let each fresh slot go on where a full one does not."""
        for family, old, new in zip(
            self.of(full).tolist(), full.tolist(), fresh.tolist(), strict=True
        ):
            self._families[old] = self._families[new] = family
            self._newest[family] = new

    def forget(self, slots: Int64s) -> None:
        """Slots are freed."""
        if not self._families:
            return
        for slot in slots.tolist():
            family = self._families.pop(slot, None)
            if family is not None and self._newest.get(family) == slot:
                del self._newest[family]


def fits(domain: Domain, slots: Int64s, cap: int) -> Mask:
    """Return which pages may map these slots, if those before them do; 0 caps nothing."""
    if not cap:
        return np.ones(slots.size, np.bool_)
    taken = domain.books.table.references(slots) + domain.in_flight(slots)
    mask: Mask = (slots == wire.ZERO_SLOT) | (taken + ranks(slots) < cap)
    return mask


class Overflow:
    """Finds other slots for pages whose slots are full."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._one_at_a_time = asyncio.Lock()

    async def place(self, arena: Arena, pages: Int64s, full: Int64s) -> Outcomes:
        """Let pages (ascending, each once) map slots with the bytes that their full ones have."""
        domain = arena.domain
        outcomes = np.full(pages.size, Outcome.BUSY, np.uint8)
        alive = np.flatnonzero(domain.books.table.contains(full))
        hold = domain.books.hold(full[alive])
        try:
            async with self._one_at_a_time:
                for low in range(0, alive.size, _STEP_PAGES):
                    some = alive[low : low + _STEP_PAGES]
                    outcomes[some] = await self._step(arena, pages[some], full[some])
        finally:
            domain.free(domain.books.release(hold))
        return outcomes

    async def _step(self, arena: Arena, pages: Int64s, full: Int64s) -> Outcomes:
        newest = arena.domain.families.newest(full)
        outcomes = np.full(pages.size, FULL, np.uint8)
        left, before = np.arange(pages.size), 0
        # again as long as some did not stay that room was kept for
        while left.size and left.size != before:
            before = left.size
            outcomes[left] = await self._orders.replace(arena, pages[left], newest[left])
            left = left[outcomes[left] == FULL]
        if left.size:
            outcomes[left] = await self._promote(arena, pages[left], full[left])
        # somebody joined meanwhile, by another way
        outcomes[outcomes == FULL] = Outcome.BUSY
        return outcomes

    async def _promote(self, arena: Arena, pages: Int64s, full: Int64s) -> Outcomes:
        """Give the first page of each family and every n-th after it a slot, for those between."""
        domain = arena.domain
        leads, of_lead = _led(domain.families.of(full), self._orders.sharers_max() or pages.size)
        fresh = domain.store.reserve(int(leads.sum())) + np.arange(int(leads.sum()))
        hold = domain.books.add(fresh)
        try:
            lead = await self._lead(arena, pages[leads], full[leads], fresh)
            mapped = lead == Outcome.MERGED
            domain.families.add(full[leads][mapped], fresh[mapped])
            outcomes = np.full(pages.size, Outcome.BUSY, np.uint8)
            outcomes[leads] = lead
            follows = ~leads & mapped[of_lead]
            slots = fresh[of_lead[follows]]
            outcomes[follows] = await self._orders.replace(arena, pages[follows], slots)
        finally:
            domain.free(domain.books.release(hold))
        return outcomes

    async def _lead(self, arena: Arena, pages: Int64s, full: Int64s, fresh: Int64s) -> Outcomes:
        """Fill fresh slots with the pages' bytes, if they are the full slots', and map them."""
        store = arena.domain.store
        outcomes = np.full(pages.size, Outcome.BUSY, np.uint8)
        equal = np.zeros(pages.size, np.bool_)

        def keep(low: int, read: Outcomes, data: memoryview) -> None:
            for at in np.flatnonzero(read == Outcome.MERGED).tolist():
                page = data[at * wire.PAGE_SIZE : (at + 1) * wire.PAGE_SIZE]
                if page == store.read(int(full[low + at]), 1):
                    store.write(int(fresh[low + at]), page)
                    equal[low + at] = True

        room = store.room(pages.size)
        with contextlib.suppress(StoreFullError):
            outcomes[:room] = await self._orders.read(arena, pages[:room], keep)
        read = outcomes == Outcome.MERGED
        outcomes[read & ~equal] = Outcome.DIFFERS
        good = read & equal
        private = arena.map.slots(pages) == PRIVATE
        outcomes[good & ~private] = Outcome.BUSY
        good &= private
        outcomes[good] = await self._orders.replace(arena, pages[good], fresh[good])
        return outcomes


def _led(families: Int64s, cap: int) -> tuple[Mask, npt.NDArray[np.intp]]:
    """Return which pages lead, so that each has less than `cap` after it in its family; and for
    each page, which of the leading ones that is, counted."""
    leads: Mask = ranks(families) % cap == 0
    order = np.argsort(families, kind="stable")
    last = np.maximum.accumulate(np.where(leads[order], np.arange(order.size), 0))
    of_lead = np.empty(order.size, np.intp)
    of_lead[order] = (np.cumsum(leads) - 1)[order[last]]
    return leads, of_lead
