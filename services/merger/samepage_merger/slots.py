"""The slots of one store that live, with what is known of each.

Slot numbers only grow and are never used twice, so the live ones get sparse over time. They are
kept in arrays sorted by number: a new slot goes to the end, a freed one stays until half of the
entries are dead and the arrays are packed. Memory is thus 14 bytes a live slot, at most three
times that for a moment, however large the numbers are. Slots that are given together are found
together: a run of them is looked up once, and worked on as a slice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from samepage_merger.runs import Index, Int64s, is_run, unique

_CAPACITY_MIN = 1024
_DEAD = -1


class SlotTable:
    """The references of each live slot, and its keepers. Slots with neither may live too."""

    def __init__(self) -> None:
        self._slots = np.empty(_CAPACITY_MIN, np.int64)
        self._references = np.empty(_CAPACITY_MIN, np.int32)
        self._keepers = np.empty(_CAPACITY_MIN, np.uint16)
        self._used = 0
        self._dead = 0
        self._referenced = 0

    def __len__(self) -> int:
        return self._used - self._dead

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the table takes."""
        return self._slots.nbytes + self._references.nbytes + self._keepers.nbytes

    def live(self) -> Int64s:
        """Return all live slots, ascending."""
        slots: Int64s = self._slots[: self._used][self._references[: self._used] != _DEAD]
        return slots

    def counts(self) -> tuple[Int64s, npt.NDArray[np.int32]]:
        """Return copies of all entries' slots, ascending, and references (those of dead ones
        mean nothing)."""
        return self._slots[: self._used].copy(), self._references[: self._used].copy()

    def total_references(self) -> int:
        """Return the sum of all slots' references."""
        return int(self._references[: self._used].sum(dtype=np.int64)) + self._dead

    def referenced(self) -> int:
        """Return how many slots have at least one reference."""
        return self._referenced

    def missing(self, slots: Int64s) -> Int64s:
        """Return those of the slots that do not live, each once, ascending."""
        slots = unique(slots)
        return slots[~self.contains(slots)]

    def contains(self, slots: Int64s) -> npt.NDArray[np.bool_]:
        """Return whether each slot lives."""
        at = self._run(slots)
        if at is not None:
            alive: npt.NDArray[np.bool_] = self._references[at] != _DEAD
            return alive
        return self._search(slots)[0]

    def add(self, slots: Int64s) -> None:
        """Enter slots (ascending, each once, none alive) with no references."""
        if self._used and slots.size and slots[0] <= self._slots[self._used - 1]:
            self._insert(slots)
            return
        end = self._used + slots.size
        self._reserve(end)
        self._slots[self._used : end] = slots
        self._references[self._used : end] = 0
        self._keepers[self._used : end] = 0
        self._used = end

    def reference(self, slots: Int64s) -> None:
        """Add a reference for each slot named; a slot may be named many times."""
        at = self._at(slots)
        if isinstance(at, slice):
            self._referenced += slots.size - int(np.count_nonzero(self._references[at]))
            self._references[at] += 1
        else:
            new = unique(at[self._references[at] == 0])
            self._referenced += new.size
            np.add.at(self._references, at, 1)

    def unreference(self, slots: Int64s) -> Int64s:
        """Drop a reference for each slot named; return those left without, ascending."""
        at = self._at(slots)
        if isinstance(at, slice):
            self._references[at] -= 1
            run: Int64s = slots[self._references[at] == 0]
            self._referenced -= run.size
            return run
        np.subtract.at(self._references, at, 1)
        at = unique(at)
        left: Int64s = self._slots[at[self._references[at] == 0]]
        self._referenced -= left.size
        return left

    def references(self, slots: Int64s) -> Int64s:
        """Return the references of each slot; 0 where it does not live."""
        at = self._run(slots)
        if at is not None:
            return np.maximum(self._references[at], 0, dtype=np.int64)
        found, where = self._search(slots)
        return np.where(found, self._references[where], 0).astype(np.int64)

    def keep(self, slots: Int64s) -> None:
        """Add a keeper for each live slot, each named once."""
        self._keepers[self._at(slots)] += 1

    def unkeep(self, slots: Int64s) -> None:
        """Drop a keeper of each slot, each named once."""
        self._keepers[self._at(slots)] -= 1

    def unkept(self, slots: Int64s) -> Int64s:
        """Return those of the live slots that have no keeper."""
        unkept: Int64s = slots[self._keepers[self._at(slots)] == 0]
        return unkept

    def remove(self, slots: Int64s) -> None:
        """Forget live slots, each named once."""
        at = self._at(slots)
        self._referenced -= int(np.count_nonzero(self._references[at]))
        self._references[at] = _DEAD
        self._dead += slots.size
        if self._dead > max(len(self), _CAPACITY_MIN):
            alive = self._references[: self._used] != _DEAD
            self._set(*(column[: self._used][alive] for column in self._columns()))

    def _run(self, slots: Int64s) -> slice | None:
        """Where the slots are, dead ones too, if they and their entries are consecutive."""
        if not is_run(slots):
            return None
        first = int(np.searchsorted(self._slots[: self._used], int(slots[0])))
        end = first + slots.size
        if end > self._used or self._slots[first] != slots[0] or self._slots[end - 1] != slots[-1]:
            return None
        return slice(first, end)

    def _search(self, slots: Int64s) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
        if not self._used:
            return np.zeros(slots.size, np.bool_), np.zeros(slots.size, np.intp)
        at = np.searchsorted(self._slots[: self._used], slots)
        at = np.minimum(at, self._used - 1)
        return (self._slots[at] == slots) & (self._references[at] != _DEAD), at

    def _at(self, slots: Int64s) -> Index:
        run = self._run(slots)
        if run is not None and not bool((self._references[run] == _DEAD).any()):
            return run
        found, at = self._search(slots)
        if not found.all():
            raise KeyError(f"slots that do not live: {slots[~found][:8].tolist()}")
        return at

    def _insert(self, slots: Int64s) -> None:
        alive = self._references[: self._used] != _DEAD
        none = np.zeros(slots.size, np.uint16)
        new: tuple[npt.NDArray[np.integer], ...] = (slots, none.astype(np.int32), none)
        columns = [
            np.concatenate((column[: self._used][alive], fresh))
            for column, fresh in zip(self._columns(), new, strict=True)
        ]
        order = np.argsort(columns[0], kind="stable")
        self._set(*(column[order] for column in columns))

    def _columns(self) -> tuple[npt.NDArray[np.integer], ...]:
        return self._slots, self._references, self._keepers

    def _set(
        self,
        slots: npt.NDArray[np.integer],
        references: npt.NDArray[np.integer],
        keepers: npt.NDArray[np.integer],
    ) -> None:
        self._used = 0
        self._dead = 0
        self._slots = np.empty(0, np.int64)
        self._references = np.empty(0, np.int32)
        self._keepers = np.empty(0, np.uint16)
        self._reserve(slots.size)
        self._used = slots.size
        self._slots[: self._used] = slots
        self._references[: self._used] = references
        self._keepers[: self._used] = keepers

    def _reserve(self, size: int) -> None:
        if size <= self._slots.size:
            return
        capacity = max(_CAPACITY_MIN, size + size // 4)
        for name in ("_slots", "_references", "_keepers"):
            old = getattr(self, name)
            new = np.empty(capacity, old.dtype)
            new[: self._used] = old[: self._used]
            setattr(self, name, new)
