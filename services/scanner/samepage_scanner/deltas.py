"""What changed on this host since the index was last told.

Theory. Which fingerprints the index knows of a domain is not kept as a list, which would cost 16
bytes a page: a bit with every page says that its fingerprint was published, and whatever such a
page loses goes to `Domain.retired`. So of a fingerprint that the index knows, at all times, a
page with the bit holds it or `retired` does; collecting settles the second case.

With sampling, only fingerprints whose lowest `bits` bits are zero are published. When that number
grows, pages with the bit that should not have it lose it, and their fingerprints go to `retired`.

All functions here want `Books.lock` held, and may run in another thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Domain
from samepage_scanner.pages import HAS_FINGERPRINT, HAS_STABLE_FINGERPRINT, PUBLISHED, Pages

COLLECT_PAGES = 1 << 15
_COLLECT_SHARE = 8
_PART_PAGES = 1 << 16


@dataclass(frozen=True, slots=True)
class Delta:
    """Distinct fingerprints new on this host, and gone from it.

    Attributes:
        complete: nothing more is to be collected now.
    """

    added: fp.Fingerprints
    removed: fp.Fingerprints
    complete: bool


def collect(domain: Domain, limit: int = COLLECT_PAGES, bits: int = 0) -> Delta:
    """Take what the index does not know yet, and regard it as known from now on.

    Args:
        bits: publish only fingerprints whose lowest bits are zero, so many.
        limit: look at so many new pages at most, or an eighth of the domain if that is more.
    """
    domain.untold = False
    arenas = [arena.pages for arena in domain.arenas]
    limit = max(limit, sum(map(len, arenas)) // _COLLECT_SHARE)
    new = _new_pages(arenas, limit, bits)
    withdrawn = _withdraw(domain, limit, bits)
    added = fp.distinct(_gather([pages.fingerprints[rows] for pages, rows in new]))
    retired = fp.distinct(_gather(domain.retired))
    domain.retired.clear()
    both = fp.distinct(np.concatenate((added, retired)))
    held = _held(arenas, both)
    for pages, rows in new:
        pages.flags[rows] |= PUBLISHED
    is_new = fp.contains(added, fp.keys(added), both)[1]
    was_known = fp.contains(retired, fp.keys(retired), both)[1]
    complete = withdrawn < limit and sum(len(rows) for _, rows in new) < limit
    domain.untold = domain.untold or not complete
    return Delta(both[is_new & ~was_known & ~held], both[was_known & ~is_new & ~held], complete)


def forget(domain: Domain) -> None:
    """The index knows nothing of this domain."""
    domain.retired.clear()
    domain.untold = True
    for arena in domain.arenas:
        for block in arena.pages.blocks():
            flags = arena.pages.flags[block]
            if (flags & PUBLISHED).any():
                flags &= ~PUBLISHED


def distinct_parts(arenas: Sequence[Pages]) -> Iterator[fp.Fingerprints]:
    """All distinct fingerprints of arenas, stable or not, in parts of bounded size."""
    parts = sum(map(len, arenas)) // _PART_PAGES + 1
    for part in range(parts):
        chosen = []
        for pages, block in _blocks(arenas):
            fingerprints = pages.fingerprints[block]
            wanted = HAS_FINGERPRINT[pages.flags[block]]
            wanted &= fp.keys(fingerprints) % np.uint64(parts) == part
            chosen.append(fingerprints[wanted])
        yield fp.distinct(_gather(chosen))


def _withdraw(domain: Domain, limit: int, bits: int) -> int:
    """Retire what was published by a wider sampling, at most `limit` pages; how many it was."""
    left = limit
    if bits > domain.sampled:
        for pages, block in _blocks([arena.pages for arena in domain.arenas]):
            published = np.flatnonzero(pages.flags[block] & PUBLISHED) + block.start
            rows = published[~fp.sampled(pages.fingerprints[published], bits)][:left]
            if len(rows):
                domain.retired.append(pages.fingerprints[rows])
                pages.flags[rows] &= ~PUBLISHED
                left -= len(rows)
    if left:
        domain.sampled = bits
    return limit - left


def _new_pages(arenas: Sequence[Pages], limit: int, bits: int) -> list[tuple[Pages, fp.Indices]]:
    """Stable pages of the sample without the bit, at most `limit`."""
    found = []
    for pages, block in _blocks(arenas):
        flags = pages.flags[block]
        rows = np.flatnonzero(HAS_STABLE_FINGERPRINT[flags] & ((flags & PUBLISHED) == 0))
        if bits:
            rows = rows[fp.sampled(pages.fingerprints[block][rows], bits)]
        rows = rows[:limit]
        if len(rows):
            found.append((pages, rows + block.start))
            limit -= len(rows)
    return found


def _held(arenas: Sequence[Pages], wanted: fp.Fingerprints) -> fp.Mask:
    """Which of some distinct fingerprints a page with the bit holds."""
    held = np.zeros(len(wanted), np.bool_)
    if not len(wanted):
        return held
    wanted_keys = fp.keys(wanted)
    for pages, block in _blocks(arenas):
        published = (pages.flags[block] & PUBLISHED) != 0
        if published.any():
            places, found = fp.contains(wanted, wanted_keys, pages.fingerprints[block][published])
            held[places[found]] = True
    return held


def _blocks(arenas: Sequence[Pages]) -> Iterator[tuple[Pages, slice]]:
    return ((pages, block) for pages in arenas for block in pages.blocks())


def _gather(pieces: Sequence[fp.Fingerprints]) -> fp.Fingerprints:
    return np.concatenate([fp.empty(), *pieces])
