"""The books of one domain: which page maps which slot, and who holds a slot besides.

Rules.
- References of a slot = arena pages that map it, as the agents said in the order of their
  messages. An agent's word moves its own pages' references and no others.
- A hold keeps a slot without being a reference: an order names the slot, and until its outcome is
  applied nobody knows whether the page maps it.
- A slot may be kept besides: for other hosts, for hours, by the hundred thousand. That is a count
  in the table.
- A slot is freed when it has none of these. Whoever calls gets the slots that became free, and
  gives their memory back.
"""

from __future__ import annotations

import itertools

import numpy as np

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.pagemap import PRIVATE, PageMap
from samepage_merger.runs import Int64s, unique
from samepage_merger.slots import SlotTable

NO_SLOTS: Int64s = np.empty(0, np.int64)


class Books:
    """References and holds of one domain's slots.

    Attributes:
        table: the live slots.
    """

    def __init__(self) -> None:
        self.table = SlotTable()
        self._maps: set[PageMap] = set()
        self._holds: dict[int, Int64s] = {}
        self._next_hold = itertools.count(1)

    def open(self, pages: int) -> PageMap:
        """Return the empty map of a new arena.

        Raises:
            MemoryError: there is no address space for it.
        """
        page_map = PageMap(pages)
        self._maps.add(page_map)
        return page_map

    def close(self, page_map: PageMap) -> Int64s:
        """Forget an arena with all its references; return the slots that became free."""
        pages = page_map.mapped()
        freed = self.unmap(page_map, pages)
        self._maps.discard(page_map)
        return freed

    def add(self, slots: Int64s) -> int:
        """Enter new slots (ascending), held; return the hold."""
        self.table.add(slots)
        return self.hold(slots)

    def adopt(self, slots: Int64s) -> None:
        """Enter those of the slots that are not known, from before this merger's start."""
        self.table.add(self.table.missing(slots))

    def hold(self, slots: Int64s) -> int:
        """Keep slots from being freed until the hold returned is released."""
        number = next(self._next_hold)
        self._holds[number] = slots[slots != PRIVATE]
        return number

    def release(self, hold: int) -> Int64s:
        """End a hold; return the slots that became free."""
        slots = self._holds.pop(hold)
        return self._forget(unique(slots[self.table.references(slots) == 0]))

    def held(self, hold: int) -> Int64s:
        """Return the slots of a hold, as often as they were named."""
        return self._holds[hold]

    def keep(self, slots: Int64s) -> None:
        """Keep live slots (each named once) until `unkeep`, as many times as this was called."""
        self.table.keep(slots)

    def unkeep(self, slots: Int64s) -> Int64s:
        """Take back a `keep` of each slot (ascending); return the slots that became free."""
        self.table.unkeep(slots)
        return self._forget(slots[self.table.references(slots) == 0])

    def map(self, page_map: PageMap, pages: Int64s, slots: Int64s) -> Int64s:
        """Let pages (each named once) map live slots, or none where the slot is PRIVATE.

        Returns the slots that became free.
        """
        self.table.reference(slots[slots != PRIVATE])
        before = page_map.put(pages, slots)
        return self._forget(self.table.unreference(before[before != PRIVATE]))

    def unmap(self, page_map: PageMap, pages: Int64s) -> Int64s:
        """Let pages (each named once) map no slot; return the slots that became free."""
        return self.map(page_map, pages, np.zeros(pages.size, np.int64))

    def reverse_map(self, slot: int) -> list[tuple[PageMap, Int64s]]:
        """Return which pages map a slot, by arena; looks at every shared page."""
        found = []
        for page_map in self._maps:
            pages = page_map.mapped()
            pages = pages[page_map.slots(pages) == slot]
            if pages.size:
                found.append((page_map, pages))
        return found

    def saved_bytes(self, page_map: PageMap) -> int:
        """Return what sharing saves an arena: for each shared page 4096 * (1 - 1/sharers)."""
        sharers = self.table.references(page_map.slots(page_map.mapped()))
        return round(float((PAGE_SIZE * (1.0 - 1.0 / sharers)).sum()))

    def saved_pages(self) -> int:
        """Return how many pages the domain's processes would take more without sharing."""
        return self.shared_pages() - self.table.referenced()

    def shared_pages(self) -> int:
        """Return how many arena pages map a slot."""
        return sum(page_map.shared for page_map in self._maps)

    def _forget(self, unreferenced: Int64s) -> Int64s:
        if not unreferenced.size:
            return NO_SLOTS
        if self._holds:
            held = np.concatenate(list(self._holds.values()))
            unreferenced = unreferenced[~np.isin(unreferenced, held)]
        unreferenced = self.table.unkept(unreferenced)
        self.table.remove(unreferenced)
        return unreferenced
