"""What one snapshot offers: pages as they were read, until the host that clones the arena has them.

Theory. A clone wants each page once, and at once. So nothing is frozen for it, and no page is given
a slot: what was read stays in a buffer, its digests are told, and whoever asks for these gets the
bytes from there. There are few buffers; who reads on waits until the owner has taken a stretch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests
from samepage_merger.cluster.digests import Fingerprints, are_zero, equal
from samepage_merger.cluster.keys import Keys, keys_of
from samepage_merger.runs import Indices, join

#: What is done for each stretch costs much the same, however long it is.
OFFER_PAGES = 8192
#: The first stretch is soon under way.
FIRST_PAGES = 1024
_OFFERS_MAX = 2

#: A row of bytes a page.
Rows = npt.NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class _Offer:
    """One stretch.

    Attributes:
        fingerprints: as many as digests.
        keys: of its digests, ascending; those of zeros are left out.
        rows: which page each of these is.
        readers: who looks at its data now.
    """

    digests: Digests
    fingerprints: Fingerprints
    data: Rows
    keys: Keys
    rows: Indices
    readers: int = 0

    def find(self, digests: Digests) -> Indices | None:
        """Return which pages have these digests, None unless all are here."""
        if not self.keys.size:
            return None
        at = np.searchsorted(self.keys, keys_of(digests))
        rows = self.rows[np.minimum(at, self.keys.size - 1)]
        return rows if bool(equal(self.digests[rows], digests).all()) else None

    def parts(self, rows: Indices) -> Sequence[Bytes]:
        """Return pages, those that follow each other as one."""
        first, count = join(rows)
        runs = zip(first.tolist(), count.tolist(), strict=True)
        return [self.data[row : row + pages].reshape(-1).data for row, pages in runs]


def stretch_end(first: int, pages: int) -> int:
    """Return where the stretch ends that begins at `first`, in an arena of so many pages: each is
    as long as all before it, up to OFFER_PAGES."""
    return min(pages, first + min(OFFER_PAGES, max(FIRST_PAGES, first)))


class Offers:
    """The stretches that one snapshot offers."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_OFFERS_MAX)
        self._buffers: list[Rows] = []
        self._offers: dict[int, _Offer] = {}

    async def buffer(self) -> Rows:
        """Return room for OFFER_PAGES pages, as soon as there is some; it is for one `add`."""
        await self._places.acquire()
        if self._buffers:
            return self._buffers.pop()
        return np.empty((OFFER_PAGES, PAGE_SIZE), np.uint8)

    def add(self, first: int, digests: Digests, fingerprints: Fingerprints, data: Rows) -> None:
        """Offer the stretch that begins at a page; `data` is a buffer that begins with its pages,
        but for those of zeros."""
        keys = keys_of(digests)
        order = np.argsort(keys, kind="stable")
        order = order[~are_zero(digests)[order]]
        self._offers[first] = _Offer(digests, fingerprints, data, keys[order], order)

    def taken(self, first: int) -> None:
        """Offer a stretch no longer; one that is not offered is no error."""
        offer = self._offers.pop(first, None)
        if offer is not None:
            # Whoever still reads there must not see what comes next.
            if not offer.readers:
                self._buffers.append(offer.data)
            self._places.release()

    def describe(self, first: int) -> tuple[Digests, Fingerprints] | None:
        """Return what the pages of a stretch are; None when it is not offered."""
        offer = self._offers.get(first)
        return None if offer is None else (offer.digests, offer.fingerprints)

    async def all_taken(self) -> None:
        """Wait until nothing is offered; nothing is from then on."""
        for _ in range(_OFFERS_MAX):
            await self._places.acquire()

    def clear(self) -> None:
        """Offer nothing any more."""
        self._offers.clear()
        self._buffers.clear()

    @contextmanager
    def find(self, digests: Digests) -> Iterator[Sequence[Bytes] | None]:
        """Give the pages with these digests, in order and in parts, if one stretch has them all.

        The parts stay as they are for as long as the block runs.
        """
        for offer in self._offers.values():
            rows = offer.find(digests)
            if rows is not None:
                offer.readers += 1
                try:
                    yield offer.parts(rows)
                finally:
                    offer.readers -= 1
                return
        yield None
