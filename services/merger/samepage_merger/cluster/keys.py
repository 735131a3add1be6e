"""Tables and sets of many digests, by their first bytes, in sorted arrays.

Theory. A few sorted arrays, each at least twice as long as the next: adding joins the short ones
and leaves the long ones alone, finding is a search in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import words
from samepage_merger.runs import Int64s, expand

Keys = npt.NDArray[np.uint64]


def keys_of(digests: Digests) -> Keys:
    """Return the first 8 bytes of each digest: a hint, that proves nothing."""
    keys: Keys = words(digests)[:, 0].copy()
    return keys


def are_distinct(keys: Keys) -> bool:
    """Return whether no key is there twice."""
    ascending = np.sort(keys)
    return not bool((ascending[1:] == ascending[:-1]).any())


def are_among(keys: Keys, ascending: Keys) -> Mask:
    """Return which keys are among others."""
    if not ascending.size:
        return np.zeros(keys.size, np.bool_)
    at = np.searchsorted(ascending, keys)
    among: Mask = ascending.take(at, mode="clip") == keys
    return among


@dataclass(frozen=True, slots=True)
class _Level:
    keys: Keys
    values: npt.NDArray[Any]


class KeyTable:
    """Numbers by key, or records; a key may have several.

    Args:
        alive: says which numbers still mean something. The others are dropped when arrays are
            joined, and may be found until then.
        dtype: of the numbers.
    """

    def __init__(
        self,
        alive: Callable[[npt.NDArray[Any]], Mask] | None = None,
        dtype: npt.DTypeLike = np.int64,
    ) -> None:
        self._alive = alive
        self._none = np.empty(0, dtype)
        self._levels: list[_Level] = []

    def __len__(self) -> int:
        return sum(level.keys.size for level in self._levels)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the table takes."""
        return sum(level.keys.nbytes + level.values.nbytes for level in self._levels)

    def all(self) -> tuple[Keys, npt.NDArray[Any]]:
        """Return all keys and their numbers, in no order; of this instant."""
        return (
            np.concatenate([np.empty(0, np.uint64), *(level.keys for level in self._levels)]),
            np.concatenate([self._none, *(level.values for level in self._levels)]),
        )

    def find(self, keys: Keys) -> tuple[Int64s, npt.NDArray[Any]]:
        """Return all entries with these keys: which of the keys, ascending, and the number."""
        places, values = [np.empty(0, np.int64)], [self._none]
        # What is close to each other is found in memory that was just looked at.
        ascending = np.argsort(keys)
        keys = keys[ascending]
        for level in self._levels:
            first = np.searchsorted(level.keys, keys)
            here = np.flatnonzero(level.keys.take(first, mode="clip") == keys)
            first = first[here]
            count = np.searchsorted(level.keys, keys[here], side="right") - first
            places.append(np.repeat(ascending[here], count))
            values.append(level.values[expand(first, count)])
        place, value = np.concatenate(places), np.concatenate(values)
        order = np.argsort(place, kind="stable")
        return place[order], value[order]

    def find_one(self, key: np.uint64) -> Iterator[int]:
        """Return all numbers of one key, in no order: faster than `find`."""
        for level in self._levels:
            at = int(level.keys.searchsorted(key))
            while at < level.keys.size and level.keys[at] == key:
                yield int(level.values[at])
                at += 1

    def add(self, keys: Keys, values: npt.NDArray[Any]) -> None:
        """Enter numbers that are not in the table."""
        while self._levels and self._levels[-1].keys.size < 2 * keys.size:
            level = self._levels.pop()
            if self._alive is not None:
                alive = self._alive(level.values)
                level = _Level(level.keys[alive], level.values[alive])
            keys = np.concatenate((level.keys, keys))
            values = np.concatenate((level.values, values))
        if keys.size:
            order = np.argsort(keys, kind="stable")
            self._levels.append(_Level(keys[order], values[order]))

    def remove(self, values: Int64s) -> None:
        """Take out all entries with these numbers."""
        levels, self._levels = self._levels, []
        for level in levels:
            keep: Mask = ~np.isin(level.values, values)
            self.add(level.keys[keep], level.values[keep])
