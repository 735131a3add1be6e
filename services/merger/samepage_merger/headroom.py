"""Admission: merges that could not be undone are not made.

Theory. A merge is a promise: the bytes that it saves may have to be found again at once, when the
applications write. Hosts are given this software so that the memory it saves can be used, so not
all of it can be kept ready; but some of it must be, else a burst of writes ends in the kernel
killing processes. `headroom_percent` of what merging saves must fit into the memory that the host
has left, and merges beyond are refused until it does.

A merge asks before its first order for all the pages that it would save, and says when it is
through; what is asked for counts as saved meanwhile. The host's memory is read a few times a
second, however many pages are merged, and somewhat more often when it runs short.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from samepage.daemon.policies import Policies
from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.config import Config

_READ_SECONDS = 0.25
# When the last look at the host's memory is not enough: merging itself gives memory back.
_READ_AGAIN_SECONDS = 0.02
_WARN_SECONDS = 60.0

log = structlog.get_logger(__name__)


class Headroom:
    """Says how many pages may be merged.

    Args:
        saved: pages that merging saves now.
        available: bytes of memory that the host has left.

    Attributes:
        refused: pages that were refused, since start.
    """

    def __init__(
        self, policies: Policies[Config], saved: Callable[[], int], available: Callable[[], int]
    ) -> None:
        self._policies = policies
        self._saved = saved
        self._available = available
        self._asked = 0
        self._memory = 0
        self._read_at = -_READ_SECONDS
        self._next_warning = 0.0
        self.refused = 0
        policies.follow(self._changed)

    def take(self, pages: int) -> int:
        """Return how many of so many more pages may be saved; they are to be given back."""
        left = self._left(_READ_SECONDS)
        if left < pages:
            left = self._left(_READ_AGAIN_SECONDS)
        granted = max(0, min(pages, left))
        self._asked += granted
        if granted < pages:
            self.refused += pages - granted
            self._warn()
        return granted

    def give_back(self, pages: int) -> None:
        """So many of the pages that were taken are saved by now, or will not be."""
        self._asked -= pages

    def available_bytes(self, age: float = _READ_SECONDS) -> int:
        """Bytes of memory that undone merges may count on, by a look at most `age` seconds old."""
        now = time.monotonic()
        if now >= self._read_at + age:
            self._read_at = now
            self._memory = self._available()
        ceiling = self._policies.current.memory_ceiling_bytes
        return min(self._memory, ceiling) if ceiling else self._memory

    def left_bytes(self) -> int:
        """Bytes that merging may save more; 2**63 - 1 when nothing limits it."""
        return max(0, min(self._left(_READ_SECONDS) * PAGE_SIZE, 2**63 - 1))

    def _left(self, age: float) -> int:
        percent = self._policies.current.headroom_percent
        if percent == 0:
            return 2**62
        within = int(self.available_bytes(age) * 100 / percent) // PAGE_SIZE
        return within - self._saved() - self._asked

    def _changed(self) -> None:
        self._next_warning = 0.0

    def _warn(self) -> None:
        now = time.monotonic()
        if now < self._next_warning:
            return
        self._next_warning = now + _WARN_SECONDS
        log.warning(
            "pages stay private: undoing more merges might not fit into the host's memory. Free"
            " some memory, or change headroom_percent or memory_ceiling_bytes",
            saved_bytes=self._saved() * PAGE_SIZE,
            available_bytes=self.available_bytes(),
            headroom_percent=self._policies.current.headroom_percent,
        )
