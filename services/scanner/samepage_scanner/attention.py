"""Where in an arena the next pass looks, by blocks of pages: 4 bytes for each 256 pages.

Theory. An agent that tracks writes names the pages written since it was asked; one that does not
has everything fingerprinted. Either way a block is

- *stale* when it has to be fingerprinted whatever the agent says of writes: it was never looked
  at, it was merged since, a look at it was broken off, or its turn has come to be checked for
  what tracking does not report. Without tracking, every pass begins by making all blocks stale,
  unless the pass before was interrupted: then the rest comes first.
- *unsettled* when some page of it is not known to stand still yet. A page that was fingerprinted
  and that the agent does not name the next time stood still; so settled blocks that do not
  change cost nothing at all.
- *resting* when it changed in several looks one after the other: it is left alone for 2, 4, 8...
  passes. A block that nobody asks for is not write-protected again either, which saves the
  application the faults.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from samepage_scanner import fingerprints as fp

BLOCK_PAGES = 256

# Orders and their pauses go by stretches of at most 1 GiB.
STRETCH_PAGES = 1 << 18
REST_MAX = 255

_STREAK_MAX = 254
_NEVER_LOOKED_AT = 255

Counts = npt.NDArray[np.uint8]


class Attention:
    """The blocks of one arena.

    Attributes:
        stale, unsettled: by block, see above.
        streak: by block, looks in which it changed, one after the other.
        rest: by block, passes for which it is left alone yet.
    """

    __slots__ = ("_checked", "pages", "rest", "stale", "streak", "unsettled")

    def __init__(self, pages: int) -> None:
        blocks = -(-pages // BLOCK_PAGES)
        self.pages = pages
        self.stale = np.ones(blocks, np.bool_)
        self.unsettled = np.zeros(blocks, np.bool_)
        self.streak: Counts = np.full(blocks, _NEVER_LOOKED_AT, np.uint8)
        self.rest: Counts = np.zeros(blocks, np.uint8)
        self._checked = 0.0

    def begin(self, tracked: bool, everything: bool) -> fp.Mask:
        """Begin a pass.

        Args:
            tracked: the agent names what was written.
            everything: look at resting blocks too.

        Returns:
            By block, whether this pass deals with it.
        """
        due = np.ones_like(self.stale) if everything else self.rest == 0
        if not everything:
            self.rest[~due] -= 1
        if tracked:
            return due
        if everything or not (due & self.stale).any():
            self.stale |= due
        return due & self.stale

    def check(self, share: float) -> None:
        """Make the next blocks in turn stale: a share of all of them (0 to 1)."""
        count = len(self.stale)
        first = self._checked
        self._checked += min(share, 1.0) * count
        places = np.arange(int(first), int(self._checked)) % count
        self.stale[places] = True
        self._checked %= count

    def stretches(self, due: fp.Mask) -> Iterator[tuple[int, int]]:
        """Blocks side by side that are due: the first, and the one after the last."""
        for first, end in zip(*_edges(due), strict=True):
            step = STRETCH_PAGES // BLOCK_PAGES
            for start in range(first, end, step):
                yield start, min(start + step, end)

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Blocks as pages: the first, and how many."""
        return first * BLOCK_PAGES, min(end * BLOCK_PAGES, self.pages) - first * BLOCK_PAGES

    def mark(self, pages: fp.Indices, counts: fp.Indices) -> None:
        """Make the blocks of some runs of pages stale."""
        first = pages // BLOCK_PAGES
        end = (pages + counts - 1) // BLOCK_PAGES + 1
        change = np.zeros(len(self.stale) + 1, np.int64)
        np.add.at(change, first, 1)
        np.subtract.at(change, end, 1)
        self.stale |= np.cumsum(change)[:-1] > 0

    def looked(self, first: int, end: int, changed: fp.Mask, rest_max: int) -> None:
        """Note which of some blocks changed, and let those rest that keep changing.

        Args:
            changed: of the blocks from `first` up to `end`.
            rest_max: passes that a block may be left alone, 0 to REST_MAX.
        """
        streak = self.streak[first:end].astype(np.int64)
        streak[streak == _NEVER_LOOKED_AT] = -1
        streak = np.where(changed, np.minimum(streak + 1, _STREAK_MAX), 0)
        self.streak[first:end] = streak
        rest = np.minimum(1 << np.clip(streak - 1, 0, 8), rest_max)
        self.rest[first:end] = np.where(streak >= 2, rest, 0)


def runs(mask: fp.Mask) -> npt.NDArray[np.int64]:
    """Where a mask is true, as rows of first and count."""
    first, end = _edges(mask)
    return np.stack((first, np.subtract(end, first)), axis=1)


def _edges(mask: fp.Mask) -> tuple[list[int], list[int]]:
    padded = np.zeros(len(mask) + 2, np.int8)
    padded[1:-1] = mask
    steps = np.diff(padded)
    return np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist()
