"""Which blocks of an arena are cold: nothing in them changed for a time. 6 bytes for 256 pages.

A block that was evicted and comes back was not cold after all: it has to stand still for twice as
long as before, and so on. Reads are not seen, so a block that is read all the time leaves once and
comes back at once; the doubling is what keeps it here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from samepage_scanner import fingerprints as fp
from samepage_scanner.attention import BLOCK_PAGES

_DOUBLINGS_MAX = 16


class Coldness:
    """The blocks of one arena.

    Args:
        now: a clock, in seconds.
    """

    __slots__ = ("_began", "_changed_at", "_changes_left", "_doublings", "_now")

    def __init__(self, pages: int, now: Callable[[], float] = time.monotonic) -> None:
        blocks = -(-pages // BLOCK_PAGES)
        self._now = now
        self._began = now()
        self._changed_at = np.zeros(blocks, np.float32)
        self._doublings = np.zeros(blocks, np.uint8)
        # Of an evicted block, after how many changes it is back.
        self._changes_left = np.zeros(blocks, np.uint8)

    def looked(self, first: int, changed: fp.Mask) -> None:
        """Note which of some blocks, from `first` on, changed."""
        blocks = first + np.flatnonzero(changed)
        self._changed_at[blocks] = self._now() - self._began
        away = blocks[self._changes_left[blocks] > 0]
        self._changes_left[away] -= 1
        back = away[self._changes_left[away] == 0]
        self._doublings[back] = np.minimum(self._doublings[back] + 1, _DOUBLINGS_MAX)

    def cold(self, idle_seconds: float) -> fp.Mask:
        """Return which blocks stood still for so long, those left out that are away already."""
        still = self._now() - self._began - self._changed_at.astype(np.float64)
        cold: fp.Mask = still >= np.ldexp(idle_seconds, self._doublings.astype(np.int64))
        cold &= self._changes_left == 0
        return cold

    def evicted(self, blocks: fp.Indices, tracked: bool) -> None:
        """Note that blocks left. Where nobody names writes, that they are absent is a change."""
        self._changes_left[blocks] = 1 if tracked else 2
