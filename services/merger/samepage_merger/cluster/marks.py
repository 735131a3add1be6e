"""Digests with marks: many of them, each with 64 bits, in sorted arrays (see keys.py)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import DIGEST_BYTES
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.keys import Keys

Names = npt.NDArray[np.bytes_]

_NAME = f"S{DIGEST_BYTES}"


def names_of(digests: Digests) -> Names:
    """Return digests as what sorts."""
    names: Names = np.ascontiguousarray(digests).view(_NAME).reshape(-1)
    return names


def digests_named(names: Names) -> Digests:
    """Return the digests that names are of."""
    digests: Digests = np.ascontiguousarray(names).view(np.uint8).reshape(-1, DIGEST_BYTES)
    return digests


class MarkTable:
    """Digests, each with 64 marks of which at least one is set."""

    def __init__(self) -> None:
        self._names: list[Names] = []
        self._marks: list[Keys] = []

    def __len__(self) -> int:
        return sum(names.size for names in self._names)

    def marks(self, names: Names) -> Keys:
        """Return the marks of each, none of those that are not in the table."""
        marks = np.zeros(names.size, np.uint64)
        for level, marked in zip(self._names, self._marks, strict=True):
            at = np.minimum(np.searchsorted(level, names), level.size - 1)
            marks |= np.where(level[at] == names, marked[at], np.uint64(0))
        return marks

    def set(self, names: Names, mark: np.uint64) -> None:
        """Set marks of some."""
        names = np.unique(names)
        new = np.ones(names.size, np.bool_)
        for level, marked in zip(self._names, self._marks, strict=True):
            at = np.minimum(np.searchsorted(level, names), level.size - 1)
            known = level[at] == names
            marked[at[known]] |= mark
            new &= ~known
        self._add(names[new], np.full(int(np.count_nonzero(new)), mark))

    def clear(self, names: Names, mark: np.uint64) -> None:
        """Take marks of some away; those without any are not in the table any more."""
        names = np.unique(names)
        levels = list(zip(self._names, self._marks, strict=True))
        self._names, self._marks = [], []
        for level, marked in levels:
            if names.size:
                at = np.minimum(np.searchsorted(names, level), names.size - 1)
                marked[names[at] == level] &= ~mark
            self._add(level[marked != 0], marked[marked != 0])

    def all(self) -> tuple[Names, Keys]:
        """Return all of them with their marks, in no order."""
        return (
            np.concatenate([np.empty(0, _NAME), *self._names]),
            np.concatenate([np.empty(0, np.uint64), *self._marks]),
        )

    def _add(self, names: Names, marks: Keys) -> None:
        while self._names and self._names[-1].size < 2 * names.size:
            names = np.concatenate((self._names.pop(), names))
            marks = np.concatenate((self._marks.pop(), marks))
        if names.size:
            order = np.argsort(names, kind="stable")
            self._names.append(names[order])
            self._marks.append(marks[order])
