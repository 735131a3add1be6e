"""Finds equal pages among the arenas of a domain, as few and long runs.

Theory. Pages with one fingerprint make a group. Of each group one page is the leader: it gets a
slot, unless it has one already, and every private page of the group, the follower, is mapped to
that slot. Replacing costs per run rather than per page, so what matters is how well neighbours
stay together: a run is a stretch of followers side by side whose leaders lie side by side too.

That makes the leader's choice the heart of it. Taking the lowest page of each group would do when
arenas are whole copies of each other; but a copy in which every second page was changed would
then lead every second group, and cut everybody else's run to single pages. So:

1. A page that is shared already leads, since its slot is there; two shared pages are done.
2. Else, and among several shared ones, the page in the longest *chain* leads. Two neighbours are
   linked when the same two groups are neighbours at another place as well; a chain is a
   stretch of linked pages. Whoever has the most content in an order that recurs leads for all of
   it, and the choice is the same for neighbours.
3. Ties go to the lowest page, in the order of the arenas.

Leaders are never followers, so runs can be carried out in any order.

All arenas lie in one row of numbers ("places") with a gap after each, so that neighbours in the
row are neighbours in an arena and nothing has to look for arenas' ends. The work goes through the
row in blocks, and sorting through the fingerprints in parts: besides about 10 bytes a page, what
it takes on the way does not grow with the memory that is looked at, up to a million pages.

Pages that hold only zeros need no leader: their runs say NO_LEADER.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import PageState
from samepage_scanner import fingerprints as fp
from samepage_scanner.pages import (
    HAS_FINGERPRINT,
    HAS_SLOT,
    HAS_STABLE_FINGERPRINT,
    IS_STABLE_ZERO,
    IS_ZERO,
    NOTHING,
    STATE,
    Flags,
    Pages,
)

# The records of MergeRequest.runs.
RUN = np.dtype(
    [
        ("leader_arena", "<u4"),
        ("follower_arena", "<u4"),
        ("leader_page", "<u8"),
        ("follower_page", "<u8"),
        ("count", "<u8"),
    ]
)
NO_LEADER = 0xFFFF_FFFF
PLACES_MAX = 1 << 36

_PART_PAGES = 1 << 14
_PARTS_MAX = 64

# A page's fitness to lead its group, in 64 bits: shared already, length of its chain, low place.
_PLACE_BITS = np.uint64(36)
_PLACE_MASK = np.uint64(PLACES_MAX - 1)
_CHAIN_MAX = (1 << 27) - 1
_SHARED_BIT = np.uint64(1 << 63)

Runs = npt.NDArray[np.void]
Places = npt.NDArray[np.int64]
Parts = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Match:
    """What matching found.

    Attributes:
        equal: runs (dtype RUN) of equal pages, longest first.
        zero: runs of pages that hold only zeros, longest first.
        unique: by arena, private pages that no other page of those looked at is equal to, or
            that are equal in runs only that were left alone.
        same_process: by arena, pages that follow, and whose equals are all in their own process;
            only where processes were given.
    """

    equal: Runs
    zero: Runs
    unique: npt.NDArray[np.int64]
    same_process: npt.NDArray[np.int64]


def match(
    arenas: Sequence[Pages],
    *,
    waive: bool = False,
    min_run: int = 1,
    mute: Collection[int] = (),
    processes: Sequence[int] = (),
) -> Match:
    """Match all pages of one domain.

    Args:
        arenas: of one domain; at most 2**36 pages together.
        waive: look also at pages that are not stable.
        min_run: leave shorter runs of equal pages alone.
        mute: arenas, by number, that nothing can be done with now; their shared pages lead.
        processes: whose each arena is, by any number.
    """
    return _Matching(arenas, waive, mute, processes).result(min_run)


class _Matching:
    """One run of the algorithm. By place: `groups` says which group a page is in, `parts` in which
    part of the work it is looked at, from 1 on; 0 where it is in none."""

    def __init__(
        self,
        arenas: Sequence[Pages],
        waive: bool,
        mute: Collection[int],
        processes: Sequence[int],
    ) -> None:
        self._arenas = arenas
        self._processes = processes
        self._wanted = [HAS_FINGERPRINT if waive else HAS_STABLE_FINGERPRINT] * len(arenas)
        self._zeros = [IS_ZERO if waive else IS_STABLE_ZERO] * len(arenas)
        for number in mute:
            self._wanted[number], self._zeros[number] = HAS_SLOT, NOTHING
        self._bases = np.cumsum([0, *(len(pages) + 1 for pages in arenas)], dtype=np.int64)
        self._places = int(self._bases[-1])
        self._part_count = 1
        while self._part_count < _PARTS_MAX and self._part_count * _PART_PAGES < self._places:
            self._part_count *= 2
        self._groups = np.zeros(self._places, np.uint32)
        self._group_count = 0
        self._unique = np.zeros(len(arenas), np.int64)
        self._same_process = np.zeros(len(arenas), np.int64)

    def result(self, min_run: int) -> Match:
        parts = self._divided()
        for part in range(1, self._part_count + 1):
            self._number_groups(np.flatnonzero(parts == part))
        equal = np.empty((3, 0), np.int64)
        if self._group_count:
            chains = self._chains(parts)
            del parts
            leaders = self._leaders(*chains)
            equal = _join(list(self._equal(leaders)))
            if self._processes:
                self._count_same_process(leaders)
            equal = self._leave_short(equal, min_run)
        zero = _join(list(self._zero()))
        return Match(
            self._records(*equal),
            self._records(zero[0], None, zero[2]),
            self._unique,
            self._same_process,
        )

    def _divided(self) -> Parts:
        """The parts of the pages to look at, by the topmost bits of their keys."""
        parts = np.zeros(self._places, np.uint8)
        bits = self._part_count.bit_length() - 1
        for base, pages, chosen_by in zip(self._bases, self._arenas, self._wanted, strict=False):
            for block in pages.blocks():
                # Twice: no number can be shifted by all of its 64 bits.
                keys = fp.keys(pages.fingerprints[block]) >> np.uint64(1)
                part = (keys >> np.uint64(63 - bits)).astype(np.uint8) + np.uint8(1)
                parts[base + block.start : base + block.stop] = part * chosen_by[pages.flags[block]]
        return parts

    def _gather(self, places: Places) -> tuple[fp.Fingerprints, Flags]:
        """Fingerprints and flags of places (ascending)."""
        fingerprints, flags = fp.empty(len(places)), np.empty(len(places), np.uint8)
        cuts = np.searchsorted(places, self._bases)
        for base, pages, low, high in zip(
            self._bases, self._arenas, cuts[:-1], cuts[1:], strict=False
        ):
            rows = places[low:high] - base
            pages.fingerprints.take(rows, 0, fingerprints[low:high], "clip")  # all are inside
            flags[low:high] = pages.flags[rows]
        return fingerprints, flags

    def _number_groups(self, places: Places) -> None:
        """Group the pages of one part."""
        if not len(places):
            return
        fingerprints, flags = self._gather(places)
        private = (flags & STATE) == PageState.PRIVATE
        order, begins = fp.sort(fingerprints)
        private = private[order]
        starts = np.flatnonzero(begins)
        sizes = np.diff(starts, append=len(order))
        alone = starts[(sizes == 1) & private[starts]]
        self._unique += np.bincount(
            self._arena_of(places[order[alone]]), minlength=len(self._arenas)
        )
        worth = (sizes > 1) & np.logical_or.reduceat(private, starts)
        numbers = np.cumsum(worth) + self._group_count
        self._group_count = int(numbers[-1])
        self._groups[places[order]] = np.repeat(np.where(worth, numbers, 0), sizes)

    def _chains(self, parts: Parts) -> tuple[Places, Places]:
        """The chains in order: where each begins, and its length in links. `parts` is used up."""
        # Only places that are in groups, and the next ones too, are looked at.
        parts[self._groups == 0] = 0
        parts[:-1][self._groups[1:] == 0] = 0
        linked = np.zeros(self._places + 1, np.bool_)
        for part in range(1, self._part_count + 1):
            places = np.flatnonzero(parts == part)
            pairs = self._groups[places].astype(np.uint64) << np.uint64(32)
            pairs |= self._groups[places + 1]
            order = np.argsort(pairs)
            pairs = pairs[order]
            again = np.flatnonzero(pairs[1:] == pairs[:-1])
            linked[places[order[again]]] = True
            linked[places[order[again + 1]]] = True
        turns = np.flatnonzero(linked[1:] != linked[:-1]) + 1
        if linked[0]:
            turns = np.concatenate(([0], turns))
        return turns[::2], turns[1::2] - turns[::2]

    def _leaders(self, starts: Places, lengths: Places) -> Places:
        """By group, the place of its leader."""
        # One more, of no links, in front of all.
        starts, lengths = np.concatenate(([-1], starts)), np.concatenate(([-1], lengths))
        best = np.zeros(self._group_count + 1, np.uint64)
        for base, pages in zip(self._bases, self._arenas, strict=False):
            for block in pages.blocks():
                first = int(base) + block.start
                groups = self._groups[first : first + block.stop - block.start]
                rows = np.flatnonzero(groups)
                chain = np.searchsorted(starts, rows + first, "right") - 1
                # A chain of n links has n + 1 pages.
                inside = rows + first - starts[chain] <= lengths[chain]
                fitness = np.minimum(lengths[chain] * inside, _CHAIN_MAX).astype(np.uint64)
                fitness <<= _PLACE_BITS
                fitness |= _PLACE_MASK - (first + rows).astype(np.uint64)
                shared = (pages.flags[block][rows] & STATE) == PageState.SHARED
                fitness[shared] |= _SHARED_BIT
                np.maximum.at(best, groups[rows], fitness)
        best &= _PLACE_MASK
        np.subtract(_PLACE_MASK, best, out=best)
        return best.view(np.int64)

    def _equal(self, leaders: Places) -> Iterator[npt.NDArray[np.int64]]:
        """Runs of every block: followers, leaders, counts."""
        for _, places, led_by in self._followers(leaders):
            yield _runs(places, led_by)

    def _followers(self, leaders: Places) -> Iterator[tuple[int, Places, Places]]:
        """By block: its arena's number, followers, their leaders."""
        for number, (base, pages) in enumerate(zip(self._bases, self._arenas, strict=False)):
            for block in pages.blocks():
                first = int(base) + block.start
                groups = self._groups[first : first + block.stop - block.start]
                private = (pages.flags[block] & STATE) == PageState.PRIVATE
                rows = np.flatnonzero((groups > 0) & private)
                led_by = leaders[groups[rows]]
                follows = led_by != rows + first
                yield number, rows[follows] + first, led_by[follows]

    def _count_same_process(self, leaders: Places) -> None:
        """Count the followers of groups that are all of one process."""
        owners = np.full(self._group_count + 1, -1, np.int64)
        several = np.zeros(self._group_count + 1, np.bool_)
        for base, pages, process in zip(self._bases, self._arenas, self._processes, strict=False):
            groups = self._groups[base : base + len(pages)]
            groups = groups[groups > 0]
            several[groups] |= (owners[groups] >= 0) & (owners[groups] != process)
            owners[groups] = process
        for number, places, _ in self._followers(leaders):
            alone = ~several[self._groups[places]]
            self._same_process[number] += np.count_nonzero(alone)

    def _leave_short(self, runs: npt.NDArray[np.int64], min_run: int) -> npt.NDArray[np.int64]:
        """The runs that are long enough; private pages in others alone are unique."""
        short = runs[2] < min_run
        if not short.any():
            return runs
        left = np.zeros(self._places, np.bool_)
        for places in (runs[0][short], runs[1][short]):
            left |= _covered(places, runs[2][short], self._places)
        left &= ~_covered(runs[1][~short], runs[2][~short], self._places)
        for number, (base, pages) in enumerate(zip(self._bases, self._arenas, strict=False)):
            for block in pages.blocks():
                private = (pages.flags[block] & STATE) == PageState.PRIVATE
                private &= left[base + block.start : base + block.stop]
                self._unique[number] += np.count_nonzero(private)
        return runs[:, ~short]

    def _zero(self) -> Iterator[npt.NDArray[np.int64]]:
        for base, pages, chosen_by in zip(self._bases, self._arenas, self._zeros, strict=False):
            for block in pages.blocks():
                places = np.flatnonzero(chosen_by[pages.flags[block]]) + (base + block.start)
                yield _runs(places, places)

    def _arena_of(self, places: Places) -> npt.NDArray[np.intp]:
        return np.searchsorted(self._bases, places, "right") - 1

    def _records(self, followers: Places, leaders: Places | None, counts: Places) -> Runs:
        longest_first = np.argsort(-counts, kind="stable")
        followers = followers[longest_first]
        runs = np.zeros(len(followers), RUN)
        runs["count"] = counts[longest_first]
        runs["follower_arena"] = arenas = self._arena_of(followers)
        runs["follower_page"] = followers - self._bases[arenas]
        if leaders is None:
            runs["leader_arena"] = NO_LEADER
        else:
            leaders = leaders[longest_first]
            runs["leader_arena"] = arenas = self._arena_of(leaders)
            runs["leader_page"] = leaders - self._bases[arenas]
        return runs


def _runs(followers: Places, leaders: Places) -> npt.NDArray[np.int64]:
    """Join single pages, ordered by follower."""
    return _join([np.stack((followers, leaders, np.ones_like(followers)))])


def _covered(places: Places, counts: Places, total: int) -> fp.Mask:
    """By place, whether it is in a run. Runs may overlap: several follow one leader."""
    steps = np.zeros(total + 1, np.int32)
    np.add.at(steps, places, 1)
    np.subtract.at(steps, places + counts, 1)
    covered: fp.Mask = np.cumsum(steps, dtype=np.int32)[:-1] > 0
    return covered


def _join(pieces: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Join runs (rows: followers, leaders, counts), ordered by follower, where they continue."""
    runs = np.concatenate([np.empty((3, 0), np.int64), *pieces], axis=1)
    if not runs.shape[1]:
        return runs
    followers, leaders, counts = runs
    goes_on = followers[1:] == followers[:-1] + counts[:-1]
    goes_on &= leaders[1:] == leaders[:-1] + counts[:-1]
    starts = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
    return np.stack((followers[starts], leaders[starts], np.add.reduceat(counts, starts)))
