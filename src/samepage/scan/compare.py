"""What is equal to what, and what sharing it would save."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samepage.scan.memory import PAGE, Pages

Ints = npt.NDArray[np.int64]


class Kind(enum.IntEnum):
    """What a page is."""

    UNIQUE = 0
    ZERO = 1
    SAME_PROCESS = 2  # equal to others of its process alone
    SAME_HOST = 3  # equal to a page of another process
    ONE_ALREADY = 4  # the same physical page was seen before: shared by fork, KSM, the zero page


@dataclass(frozen=True)
class Counts:
    """Pages by kind, and what sharing would save. `saved` in bytes: zero pages, and each copy
    but the first."""

    pages: int
    unique: int
    zero: int
    same_process: int
    same_host: int
    one_already: int
    saved: int


@dataclass(frozen=True)
class MappingCounts:
    """The counts of the mappings of one name in one process."""

    pid: int
    command: str
    name: str
    counts: Counts


@dataclass(frozen=True)
class Report:
    """What a scan found.

    Attributes:
        total: of everything.
        processes: how many had a page.
        mappings: by process and name, most saved first.
        runs: pages that would be saved, zero pages left out, by length of their run of neighbours
            that are equal to neighbours; key: the power of two not above the length.
        swapped, changed: pages that were not looked at, since they were in swap or went meanwhile.
        frames_known: whether the kernel told which pages are one already.
    """

    total: Counts
    processes: int
    mappings: list[MappingCounts]
    runs: dict[int, int]
    swapped: int
    changed: int
    frames_known: bool

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**dataclasses.asdict(self), "runs": {str(k): v for k, v in self.runs.items()}}

    def in_runs_of(self, pages: int) -> int:
        """Bytes saved in runs at least that long."""
        return PAGE * sum(count for length, count in self.runs.items() if length >= pages)


@dataclass(frozen=True)
class Comparison:
    """By page: its kind, and the page that it would share with (-1: none, or it is the first)."""

    kinds: npt.NDArray[np.uint8]
    leaders: Ints


def compare(pages: Pages) -> Comparison:
    """Compare all pages by fingerprint; the first of equal ones leads."""
    kinds = np.full(len(pages.mapping), Kind.UNIQUE, np.uint8)
    leaders = np.full(len(pages.mapping), -1, np.int64)
    pids = np.array([mapping.pid for mapping in pages.mappings] or [0], np.int64)
    _mark_frames(pages, kinds)
    is_zero = (pages.fingerprints == pages.zero).all(axis=1) & (kinds == Kind.UNIQUE)
    kinds[is_zero] = Kind.ZERO
    rest = np.flatnonzero(kinds == Kind.UNIQUE)
    prints = pages.fingerprints[rest]
    order = np.lexsort((rest, prints[:, 1], prints[:, 0]))
    ranked, owners = prints[order], pids[pages.mapping[rest[order]]]
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    group = np.cumsum(begins) - 1
    if not len(order):
        return Comparison(kinds, leaders)
    starts = np.flatnonzero(begins)
    sizes = np.diff(np.append(starts, len(order)))
    several = np.maximum.reduceat(owners, starts) != np.minimum.reduceat(owners, starts)
    kind = np.where(sizes == 1, Kind.UNIQUE, np.where(several, Kind.SAME_HOST, Kind.SAME_PROCESS))
    kinds[rest[order]] = kind[group]
    first = rest[order[starts]]
    leaders[rest[order]] = np.where(begins, -1, first[group])
    return Comparison(kinds, leaders)


def report(pages: Pages, found: Comparison) -> Report:
    """Count what was found."""
    names: dict[tuple[int, str, str], list[int]] = {}
    for number, mapping in enumerate(pages.mappings):
        names.setdefault((mapping.pid, mapping.command, mapping.name), []).append(number)
    table = _counts_by_mapping(pages, found)
    rows = [
        MappingCounts(pid, command, name, _counts(table[numbers].sum(axis=0)))
        for (pid, command, name), numbers in names.items()
    ]
    rows.sort(key=lambda row: (-row.counts.saved, row.pid, row.name))
    return Report(
        total=_counts(table.sum(axis=0)),
        processes=len({mapping.pid for mapping in pages.mappings}),
        mappings=rows,
        runs=run_lengths(pages, found.leaders),
        swapped=pages.swapped,
        changed=pages.changed,
        frames_known=bool(pages.frames.any()),
    )


def run_lengths(pages: Pages, leaders: Ints) -> dict[int, int]:
    """Return how many pages are in runs of each class of lengths (its power of two)."""
    follower = np.flatnonzero(leaders >= 0)
    if not follower.size:
        return {}
    leader = leaders[follower]
    breaks = np.ones(follower.size, np.bool_)
    for side in (follower, leader):
        mapping, number = pages.mapping[side], pages.number[side].astype(np.int64)
        goes_on = (mapping[1:] == mapping[:-1]) & (np.diff(number) == 1)
        if side is follower:
            breaks[1:] = ~goes_on
        else:
            breaks[1:] |= ~goes_on
    lengths = np.diff(np.append(np.flatnonzero(breaks), follower.size))
    classes = np.bincount(np.log2(lengths).astype(np.int64), weights=lengths)
    return {1 << power: int(count) for power, count in enumerate(classes.tolist()) if count}


def _mark_frames(pages: Pages, kinds: npt.NDArray[np.uint8]) -> None:
    known = np.flatnonzero(pages.frames)
    _, first = np.unique(pages.frames[known], return_index=True)
    again = np.ones(known.size, np.bool_)
    again[first] = False
    kinds[known[again]] = Kind.ONE_ALREADY


def _counts_by_mapping(pages: Pages, found: Comparison) -> Ints:
    """By mapping: pages by kind, then pages saved."""
    table = np.zeros((len(pages.mappings), len(Kind) + 1), np.int64)
    np.add.at(table, (pages.mapping, found.kinds), 1)
    saved = (found.leaders >= 0) | (found.kinds == Kind.ZERO)
    table[:, -1] = np.bincount(pages.mapping[saved], minlength=len(pages.mappings))
    return table


def _counts(row: Sequence[int] | Ints) -> Counts:
    unique, zero, process, host, already, saved = (int(value) for value in row)
    return Counts(
        pages=unique + zero + process + host + already,
        unique=unique,
        zero=zero,
        same_process=process,
        same_host=host,
        one_already=already,
        saved=saved * PAGE,
    )
