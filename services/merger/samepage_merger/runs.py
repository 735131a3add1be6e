"""Runs of consecutive numbers, and the arrays of numbers that they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from samepage.daemon import wire

Int64s = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
Index = Int64s | Indices | slice


def expand(first: npt.NDArray[np.integer], count: npt.NDArray[np.integer]) -> Int64s:
    """Return the numbers of all runs: first, first + 1, ... of each, one run after the other."""
    counts = count.astype(np.int64)
    ends: Int64s = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    numbers: Int64s = np.arange(total, dtype=np.int64)
    numbers += np.repeat(first.astype(np.int64) - (ends - counts), counts)
    return numbers


def ascends(numbers: Int64s) -> bool:
    """Return whether each number is greater than the one before."""
    # The reduction itself: ndarray.all() takes as long again to get there.
    return bool(np.logical_and.reduce(numbers[1:] > numbers[:-1]))


def index(numbers: Int64s) -> Int64s | slice:
    """Return what picks the same elements of an array: a slice, much the faster, where it can."""
    if not is_run(numbers):
        return numbers
    first = int(numbers[0])
    return slice(first, first + numbers.size)


def is_run(numbers: Int64s) -> bool:
    """Return whether the numbers are not none, and consecutive."""
    size = numbers.size
    return size > 0 and int(numbers[-1]) - int(numbers[0]) == size - 1 and ascends(numbers)


def unique(numbers: Int64s) -> Int64s:
    """Return the numbers ascending, each once; costs little when they are so already."""
    return numbers if ascends(numbers) else np.unique(numbers)


def unique_first(numbers: Int64s) -> tuple[Int64s, Indices]:
    """Return the numbers ascending, each once, and where each is found first."""
    if ascends(numbers):
        return numbers, np.arange(numbers.size)
    return np.unique(numbers, return_index=True)


def unique_inverse(numbers: Int64s) -> tuple[Int64s, Indices]:
    """Return the numbers ascending, each once, and where in there each of those given is."""
    if ascends(numbers):
        return numbers, np.arange(numbers.size)
    return np.unique(numbers, return_inverse=True)


def unique_counts(numbers: Int64s) -> tuple[Int64s, Int64s]:
    """Return the numbers ascending, each once, and how many times each was given."""
    if ascends(numbers):
        return numbers, np.ones(numbers.size, np.int64)
    return np.unique(numbers, return_counts=True)


def ranks(numbers: Int64s) -> Int64s:
    """Return for each number how many equal ones are before it."""
    if ascends(numbers):
        return np.zeros(numbers.size, np.int64)
    order = np.argsort(numbers, kind="stable")
    begins = np.ones(numbers.size, np.bool_)
    begins[1:] = numbers[order[1:]] != numbers[order[:-1]]
    at = np.arange(numbers.size)
    found = np.empty(numbers.size, np.int64)
    found[order] = at - np.maximum.accumulate(np.where(begins, at, 0))
    return found


def join(numbers: Int64s) -> tuple[Int64s, Int64s]:
    """Return first and count of the runs in ascending numbers."""
    if is_run(numbers):
        return numbers[:1], np.array([numbers.size])
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 2) != 1)
    return numbers[starts], np.diff(starts, append=numbers.size)


def join_extents(pages: Int64s, slots: Int64s) -> npt.NDArray[np.void]:
    """Return the extents of pages and the slots they map, in the order given.

    Slot 0, the zero page, stays the same along a run; any other counts up with the page.
    """
    if is_run(pages) and is_run(slots) and slots[0] != wire.ZERO_SLOT:
        return np.array([(pages[0], pages.size, slots[0])], wire.EXTENT)
    goes_on = pages[1:] - pages[:-1] == 1
    goes_on &= slots[1:] - slots[:-1] == (slots[1:] != wire.ZERO_SLOT)
    starts = np.concatenate((np.zeros(min(1, pages.size), np.intp), np.flatnonzero(~goes_on) + 1))
    extents = np.empty(starts.size, wire.EXTENT)
    extents["page"] = pages[starts]
    extents["count"] = np.diff(starts, append=pages.size)
    extents["slot"] = slots[starts]
    return extents


def within(first: npt.NDArray[np.uint64], count: npt.NDArray[np.uint64], size: int) -> bool:
    """Return whether every run is not empty and lies in range(size); cannot overflow."""
    limit = np.uint64(size)
    if bool((count == 0).any()) or bool((count > limit).any()):
        return False
    return not bool((first > limit - count).any())


def batches(counts: Int64s, size: int) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
    """Cut runs of these lengths into batches of at most `size` numbers, in order.

    Yields the batch's pieces: of which run, from where within it, how many.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    for low in range(0, total, size):
        high = min(low + size, total)
        run = np.arange(
            np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high - 1, "right") + 1
        )
        start = np.maximum(ends[run] - counts[run], low)
        yield run, start - (ends[run] - counts[run]), np.minimum(ends[run], high) - start
