"""The VMA budget: which candidates get an arena's mappings when there are not enough of them.

Theory. A process may have so many mappings (vm.max_map_count), and an arena that shares scattered
pages takes up to two for each run: the run's own, and the private memory behind it is one by
itself from then on. So an arena may consist of `vma_budget` mappings and no more, and the longest
runs get them: before anything is ordered, runs are let in from the longest down, as long as the
boundaries that they make fit. What they really make may be less, since runs whose slots go on
join: the page map counts what came of it, and the rest is tried again.

Runs that come later may be better than those that are in. When an arena is full, its shortest runs
are restored for runs at least WORTH times as long. Three short ones may have to go until two
mappings are free, where they lie side by side, and a longer one that is let in is never let go for
an equal: so this ends, and every exchange saves memory. A few are restored at a time, since their
bytes are wanted before the longer runs give any back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage.daemon.policies import Policies
from samepage.daemon.wire import Outcome
from samepage_merger.arena import Arena
from samepage_merger.config import Config
from samepage_merger.orders import Orders
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s, expand, join_extents

WORTH = 4
RESTORED_PAGES_MAX = 1024

_LIMIT = Path("/proc/sys/vm/max_map_count")
_SHARE_OF_LIMIT = 4
# A run's own, and the private memory behind it.
_MAPPINGS_A_RUN = 2
_NEVER = 1 << 40
_SIDES = ("leader", "follower")

Runs = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]


def default_budget() -> int:
    """A quarter of what the kernel lets a process have."""
    return int(_LIMIT.read_text()) // _SHARE_OF_LIMIT


class MappingBudget:
    """Says which runs may take mappings.

    Args:
        orders: restores what has to make room.
    """

    def __init__(self, policies: Policies[Config], orders: Orders) -> None:
        self._policies = policies
        self._orders = orders

    def choose(self, arenas: Sequence[Arena | None], runs: Runs) -> Mask:
        """Return which runs (longest first) their arenas have mappings for.

        Args:
            arenas: by the number that runs name them by; None takes none.
        """
        chosen = np.ones(runs.size, np.bool_)
        for arena, number in self._short_of_room(arenas, runs):
            at = np.flatnonzero(chosen & _names(runs, number))
            room = self._budget() - arena.map.mappings
            if at.size:
                chosen[at] = _fitting(arena, *_pieces(runs[at], number), room)
        return chosen

    def longest(self, arena: Arena, pages: Int64s, slots: Int64s) -> Mask:
        """Return which pages (ascending) the arena has mappings for, if they shall map slots: those
        of the longest runs."""
        counts = join_extents(pages, slots)["count"].astype(np.int64)
        room = max(0, self._budget() - arena.map.mappings) // _MAPPINGS_A_RUN
        chosen = np.ones(counts.size, np.bool_)
        if counts.size > room:
            chosen[np.argsort(-counts, kind="stable")[room:]] = False
        return np.repeat(chosen, counts)

    async def make_room(self, arenas: Sequence[Arena | None], runs: Runs) -> dict[int, int]:
        """Restore short runs in full arenas for much longer ones, of which none was chosen;
        return how many pages, by arena, where any."""
        budget = self._budget()
        full = {
            number: (arena, _shortest_first(arena))
            for number, arena in enumerate(arenas)
            if arena is not None and arena.map.mappings > budget - _MAPPINGS_A_RUN
        }
        # one side alone would make room in vain
        worth = np.ones(runs.size, np.bool_)
        for number, (_, extents) in full.items():
            shortest = int(extents["count"][0]) if extents.size else _NEVER
            worth &= ~_names(runs, number) | (runs["count"] >= WORTH * shortest)
        restored = {}
        for number, (arena, extents) in full.items():
            pages = _worse(extents, runs["count"][worth & _names(runs, number)])
            if pages.size:
                outcomes = await self._orders.restore(arena, pages)
                if count := int(np.count_nonzero(outcomes == Outcome.MERGED)):
                    restored[number] = count
        return restored

    def _short_of_room(
        self, arenas: Sequence[Arena | None], runs: Runs
    ) -> Iterator[tuple[Arena, int]]:
        """Arenas that may not have mappings for all of the runs, with their numbers."""
        budget = self._budget()
        for number, arena in enumerate(arenas):
            if arena is not None:
                named = sum(int(np.count_nonzero(runs[side] == number)) for side in _SIDES)
                if arena.map.mappings + _MAPPINGS_A_RUN * named > budget:
                    yield arena, number

    def _budget(self) -> int:
        return self._policies.current.vma_budget or default_budget()


def _names(runs: Runs, number: int) -> Mask:
    mask: Mask = (runs["leader"] == number) | (runs["follower"] == number)
    return mask


def _pieces(runs: Runs, number: int) -> tuple[Int64s, Int64s, Int64s]:
    """The runs' pages in one arena: of which run, first page, count; in the runs' order."""
    of_run, first, count = [], [], []
    for side in _SIDES:
        at = np.flatnonzero(runs[side] == number)
        of_run.append(at)
        first.append(runs[f"{side}_page"][at].astype(np.int64))
        count.append(runs["count"][at].astype(np.int64))
    order = np.argsort(np.concatenate(of_run), kind="stable")
    runs_of, firsts, counts = (np.concatenate(parts)[order] for parts in (of_run, first, count))
    return runs_of, firsts, counts


def _fitting(arena: Arena, of_run: Int64s, first: Int64s, count: Int64s, room: int) -> Mask:
    """Which of the runs add no boundary, or none beyond `room` with those before them; boundary
    b is the one between pages b and b + 1."""
    ends = np.stack((first, first + count - 1), axis=1)
    boundaries = np.stack((first - 1, first + count - 1), axis=1).ravel()
    new = arena.map.slots(ends.ravel()) == PRIVATE
    new &= (boundaries >= 0) & (boundaries < arena.pages - 1)
    new[new] = ~arena.map.breaks(boundaries[new])
    owner = np.repeat(of_run, 2)[new]
    _, once = np.unique(boundaries[new], return_index=True)
    runs = int(of_run[-1]) + 1
    added = np.cumsum(np.bincount(owner[once], minlength=runs))
    fitting: Mask = (added <= room) | (np.bincount(owner, minlength=runs) == 0)
    return fitting


def _shortest_first(arena: Arena) -> npt.NDArray[np.void]:
    """The arena's runs of shared pages, as the kernel maps them."""
    pages = arena.map.mapped()
    extents = join_extents(pages, arena.map.slots(pages))
    return extents[np.argsort(extents["count"], kind="stable")]


def _worse(extents: npt.NDArray[np.void], wanted: npt.NDArray[np.unsignedinteger]) -> Int64s:
    """Pages of the shortest runs, that are to go for longer ones (their counts, longest first)."""
    size = min(extents.size, wanted.size)
    counts = extents["count"][:size].astype(np.int64)
    worse = counts * WORTH <= wanted[:size].astype(np.int64)
    worse &= np.cumsum(counts) <= RESTORED_PAGES_MAX
    # both get worse from pair to pair
    gone = extents[: int(np.count_nonzero(worse))]
    return np.sort(expand(gone["page"], gone["count"]))
