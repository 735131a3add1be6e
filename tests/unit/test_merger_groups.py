"""Groups of pages by one digest: known for as long as every slot lives, and only by all of it."""

from __future__ import annotations

import numpy as np
import pytest

from samepage_merger.books import Books
from samepage_merger.cluster.away import Digests, no_digests
from samepage_merger.cluster.digests import Digester
from samepage_merger.cluster.groups import GROUP_PAGES, Groups, group_digests
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s

DIGESTER = Digester(bytes(range(32)))
PAGES = 3 * GROUP_PAGES
SLOTS = 1000 + np.arange(PAGES)


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture(autouse=True)
def hold(books: Books) -> int:
    """Of all slots."""
    return books.add(SLOTS)


@pytest.fixture
def freed() -> list[int]:
    return []


@pytest.fixture
def groups(books: Books, freed: list[int]) -> Groups:
    return Groups(books, DIGESTER, lambda slots: freed.extend(slots.tolist()))


@pytest.fixture
def digests() -> Digests:
    return np.random.default_rng(1).integers(0, 256, (PAGES, 32), np.uint8)


def known(groups: Groups, told: Digests) -> tuple[list[bool], Int64s]:
    with groups.found(told) as found:
        return found.mask.tolist(), found.slots


def test_whole_aligned_groups_are_known(groups: Groups, digests: Digests) -> None:
    # The first page is the second of its group: two whole groups follow.
    groups.add(np.arange(1, PAGES + 1), digests, int(SLOTS[0]))
    row = GROUP_PAGES - 1
    told = group_digests(DIGESTER, digests[row : row + 2 * GROUP_PAGES])
    mask, slots = known(groups, told)
    assert mask == [True, True]
    assert slots.tolist() == SLOTS[row : row + 2 * GROUP_PAGES].tolist()
    mask, slots = known(groups, group_digests(DIGESTER, digests[: 2 * GROUP_PAGES]))
    assert mask == [False, False] and (slots == PRIVATE).all()


def test_pages_with_a_gap_are_no_group(groups: Groups, digests: Digests) -> None:
    pages = np.arange(PAGES)
    pages[100:] += 1
    groups.add(pages, digests, int(SLOTS[0]))
    assert known(groups, group_digests(DIGESTER, digests[:GROUP_PAGES]))[0] == [False]


def test_a_few_pages_are_no_group(groups: Groups, digests: Digests) -> None:
    groups.add(np.arange(5), digests[:5], int(SLOTS[0]))
    assert known(groups, group_digests(DIGESTER, digests[:5]))[0] == [False]


def test_groups_of_zeros_are_known_and_have_no_slots(groups: Groups) -> None:
    digests = no_digests(GROUP_PAGES + 3)
    digests[-1] = 1
    told = group_digests(DIGESTER, digests)
    assert len(told) == 2 and not told[0].any() and told[1].any()
    mask, slots = known(groups, told)
    assert mask == [True, False] and (slots == PRIVATE).all()


def test_no_groups_at_all(groups: Groups) -> None:
    mask, slots = known(groups, group_digests(DIGESTER, no_digests()))
    assert (mask, slots.size) == ([], 0)


def test_a_group_with_a_freed_slot_is_not_known(
    groups: Groups, books: Books, digests: Digests
) -> None:
    groups.add(np.arange(PAGES), digests, int(SLOTS[0]))
    books.table.remove(SLOTS[GROUP_PAGES + 7 : GROUP_PAGES + 8])
    mask, slots = known(groups, group_digests(DIGESTER, digests))
    assert mask == [True, False, True]
    assert (slots[GROUP_PAGES : 2 * GROUP_PAGES] == PRIVATE).all()


def test_a_group_is_known_only_by_its_whole_digest(groups: Groups, digests: Digests) -> None:
    groups.add(np.arange(PAGES), digests, int(SLOTS[0]))
    told = group_digests(DIGESTER, digests)
    # The first bytes, by which it is looked up, are the same.
    told[1, -1] ^= 1
    mask, slots = known(groups, told)
    assert mask == [True, False, True]
    assert (slots[GROUP_PAGES : 2 * GROUP_PAGES] == PRIVATE).all()


def test_slots_that_are_given_live_for_as_long_as_they_are_looked_at(
    groups: Groups, books: Books, hold: int, freed: list[int], digests: Digests
) -> None:
    groups.add(np.arange(PAGES), digests, int(SLOTS[0]))
    with groups.found(group_digests(DIGESTER, digests)[:2]):
        books_freed = books.release(hold).tolist()
        assert books_freed == SLOTS[2 * GROUP_PAGES :].tolist()
    assert freed == SLOTS[: 2 * GROUP_PAGES].tolist()


def test_groups_of_freed_slots_are_dropped(
    groups: Groups, books: Books, hold: int, digests: Digests
) -> None:
    groups.add(np.arange(PAGES), digests, int(SLOTS[0]))
    assert books.release(hold).tolist() == SLOTS.tolist()
    more = 5000 + np.arange(PAGES)
    books.add(more)
    groups.add(np.arange(PAGES), digests, int(more[0]))
    assert len(groups) == 3
    assert known(groups, group_digests(DIGESTER, digests))[1].tolist() == more.tolist()
