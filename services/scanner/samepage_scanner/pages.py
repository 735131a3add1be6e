"""What the scanner remembers of an arena's pages: 17 bytes each.

A page's flags hold its state (wire.PageState), whether its fingerprint stood still between the
last two passes, and whether the index was told of it. Pages that were never touched cost nothing:
the arrays begin as untouched zeros and only changes are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import PageState
from samepage_scanner import fingerprints as fp

Flags = npt.NDArray[np.uint8]

STATE = np.uint8(0b0011)
STABLE = np.uint8(0b0100)
PUBLISHED = np.uint8(0b1000)

# Work goes in blocks, so that temporary arrays stay small whatever an arena's size.
BLOCK = 1 << 14


def _table(states: tuple[PageState, ...], required: np.uint8) -> fp.Mask:
    flags = np.arange(256, dtype=np.uint8)
    table: fp.Mask = np.isin(flags & STATE, np.array(states, np.uint8))
    table &= (flags & required) == required
    return table


# By flags: pages that have a fingerprint, those of them that may be shared or published, ...
HAS_FINGERPRINT = _table((PageState.PRIVATE, PageState.SHARED), np.uint8(0))
HAS_STABLE_FINGERPRINT = _table((PageState.PRIVATE, PageState.SHARED), STABLE)
HAS_SLOT = _table((PageState.SHARED,), np.uint8(0))
IS_ZERO = _table((PageState.ZERO,), np.uint8(0))
IS_STABLE_ZERO = _table((PageState.ZERO,), STABLE)
NOTHING = _table((), np.uint8(0))


@dataclass(frozen=True, slots=True)
class Change:
    """What a new look at some pages showed.

    Attributes:
        differs: by page, whether it has another fingerprint than before.
        unsettled: the pages that are not stable.
        matters: whether matching could come to another result than before.
        retired: fingerprints that the index knows, of pages that do not hold them any more.
    """

    differs: fp.Mask
    unsettled: fp.Indices
    matters: bool
    retired: fp.Fingerprints


class Pages:
    """Fingerprints (n x 2 uint64) and flags (n x uint8) of one arena.

    Raises:
        MemoryError: there is no room for so many.
    """

    __slots__ = ("fingerprints", "flags")

    def __init__(self, count: int) -> None:
        self.fingerprints = fp.empty(count)
        self.flags: Flags = np.zeros(count, np.uint8)

    def __len__(self) -> int:
        return len(self.flags)

    def blocks(self) -> Iterator[slice]:
        """The arena in blocks of at most `BLOCK` pages."""
        for first in range(0, len(self), BLOCK):
            yield slice(first, min(first + BLOCK, len(self)))

    def count(self, state: PageState) -> int:
        """Pages in this state when last looked at."""
        return sum(
            int(np.count_nonzero((self.flags[block] & STATE) == state)) for block in self.blocks()
        )

    def count_stable(self) -> int:
        """Pages whose fingerprint stood still between the last two passes."""
        return sum(int(np.count_nonzero(self.flags[block] & STABLE)) for block in self.blocks())

    def update(self, pages: fp.Indices, fresh: fp.Fingerprints, states: Flags) -> Change:
        """Note what some pages (ascending) look like now. `fresh` is changed in place.

        A page is stable when its fingerprint is what it was; one that maps a slot always is.
        """
        part = _select(pages)
        old, old_flags = self.fingerprints[part], self.flags[part]
        fresh[~HAS_FINGERPRINT[states]] = 0
        same = fp.equal(old, fresh)
        shared = states == PageState.SHARED
        still = same & ((old_flags & STATE) != PageState.ABSENT) & (states != PageState.ABSENT)
        flags = states | ((still | shared) * STABLE) | (same * (old_flags & PUBLISHED))
        retired = old[~same & ((old_flags & PUBLISHED) != 0)]
        matters = bool((((flags ^ old_flags) & (STATE | STABLE)) != 0).any())
        matters = matters or bool((shared & ~same).any())
        unsettled = pages[(states != PageState.ABSENT) & ((flags & STABLE) == 0)]
        if not same.all():
            self.fingerprints[part] = fresh
        if not np.array_equal(flags, old_flags):
            self.flags[part] = flags
        return Change(~same, unsettled, matters, retired)

    def settle(self, pages: fp.Indices) -> bool:
        """Note that these pages were not written between the last two passes.

        Returns:
            Whether one of them is stable only now.
        """
        flags = self.flags[pages]
        fresh = pages[((flags & STATE) != PageState.ABSENT) & ((flags & STABLE) == 0)]
        self.flags[fresh] |= STABLE
        return bool(len(fresh))


def _select(pages: fp.Indices) -> fp.Indices | slice:
    """The same as a slice, where that can be: a view instead of a copy."""
    first, last = int(pages[0]), int(pages[-1])
    return slice(first, last + 1) if last - first + 1 == len(pages) else pages
