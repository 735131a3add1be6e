"""Groups of pages by one digest: found as long as every slot has what it should, and only then."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from helpers.merger_host import open_directory, store_directory

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.books import Books
from samepage_merger.cluster.away import Digests, no_digests
from samepage_merger.cluster.catalog import Catalog
from samepage_merger.cluster.digests import Digester
from samepage_merger.cluster.groups import GROUP_PAGES, Groups, group_digests
from samepage_merger.cluster.keys import keys_of
from samepage_merger.runs import Int64s
from samepage_merger.store import Store

DIGESTER = Digester(bytes(range(32)))
PAGES = 3 * GROUP_PAGES


@pytest.fixture
def store() -> Iterator[Store]:
    with store_directory() as path:
        directory = open_directory(path)
        yield directory.open(bytes(16))
        directory.close()


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def catalog(store: Store, books: Books) -> Catalog:
    return Catalog(books, store, DIGESTER, store.free)


@pytest.fixture
def groups(catalog: Catalog) -> Groups:
    return catalog.groups


@pytest.fixture
def kept(store: Store, books: Books, catalog: Catalog) -> tuple[Int64s, Digests]:
    """Slots with PAGES different pages, in the catalog, and their digests."""
    data = np.random.default_rng(1).bytes(PAGES * PAGE_SIZE)
    slots = store.reserve(PAGES) + np.arange(PAGES)
    books.add(slots)
    store.write(int(slots[0]), data)
    digests = DIGESTER.pages(data)
    catalog.add_fresh(keys_of(digests), slots)
    return slots, digests


async def test_whole_aligned_groups_are_found(groups: Groups, kept: tuple[Int64s, Digests]) -> None:
    slots, digests = kept
    # The first page is the second of its group: two whole groups follow.
    pages = np.arange(1, PAGES + 1)
    groups.add(pages, digests, int(slots[0]))
    row = GROUP_PAGES - 1
    known, found = await groups.find(group_digests(DIGESTER, digests[row : row + 2 * GROUP_PAGES]))
    assert known.tolist() == [True, True]
    assert found.tolist() == digests[row : row + 2 * GROUP_PAGES].tolist()
    known, found = await groups.find(group_digests(DIGESTER, digests[: 2 * GROUP_PAGES]))
    assert not known.any() and not found.any()


async def test_pages_with_a_gap_are_no_group(groups: Groups, kept: tuple[Int64s, Digests]) -> None:
    slots, digests = kept
    pages = np.arange(PAGES)
    pages[100:] += 1
    groups.add(pages, digests, int(slots[0]))
    known, _ = await groups.find(group_digests(DIGESTER, digests[:GROUP_PAGES]))
    assert not known.any()


async def test_a_few_pages_are_no_group(groups: Groups, kept: tuple[Int64s, Digests]) -> None:
    slots, digests = kept
    groups.add(np.arange(5), digests[:5], int(slots[0]))
    known, _ = await groups.find(group_digests(DIGESTER, digests[:5]))
    assert not known.any()


async def test_groups_of_zeros_are_known_and_short_ones_have_zeros(groups: Groups) -> None:
    digests = no_digests(GROUP_PAGES + 3)
    digests[-1] = 1
    told = group_digests(DIGESTER, digests)
    assert len(told) == 2 and not told[0].any() and told[1].any()
    known, found = await groups.find(told)
    assert known.tolist() == [True, False] and not found.any()


async def test_no_groups_at_all(groups: Groups) -> None:
    told = group_digests(DIGESTER, no_digests())
    known, found = await groups.find(told)
    assert (len(told), known.size, len(found)) == (0, 0, 0)


async def test_a_group_with_a_freed_slot_is_not_known(
    groups: Groups, books: Books, kept: tuple[Int64s, Digests]
) -> None:
    slots, digests = kept
    groups.add(np.arange(PAGES), digests, int(slots[0]))
    hold = books.hold(slots[GROUP_PAGES + 7 : GROUP_PAGES + 8])
    books.release(hold)
    books.table.remove(slots[GROUP_PAGES + 7 : GROUP_PAGES + 8])
    known, _ = await groups.find(group_digests(DIGESTER, digests))
    assert known.tolist() == [True, False, True]


async def test_slots_are_believed_only_by_their_bytes(
    groups: Groups, kept: tuple[Int64s, Digests]
) -> None:
    slots, digests = kept
    groups.add(np.arange(PAGES), digests, int(slots[0]))
    told = group_digests(DIGESTER, digests)
    # The same first bytes, by which it is looked up.
    told[1, -1] ^= 1
    known, found = await groups.find(told)
    assert known.tolist() == [True, False, True]
    assert not found[GROUP_PAGES : 2 * GROUP_PAGES].any()


async def test_what_was_seen_is_not_hashed_again_and_nothing_else_is_believed(
    groups: Groups, catalog: Catalog, kept: tuple[Int64s, Digests]
) -> None:
    slots, digests = kept
    groups.add(np.arange(PAGES), digests, int(slots[0]))
    assert not groups.seen(slots, digests).any()
    await groups.find(group_digests(DIGESTER, digests)[:2])
    seen = groups.seen(slots, digests)
    assert seen.tolist() == [True] * 2 * GROUP_PAGES + [False] * GROUP_PAGES
    wrong = digests.copy()
    wrong[5] ^= 1
    wrong[-5] ^= 1
    good = await catalog.verify(wrong, slots)
    assert np.flatnonzero(~good).tolist() == [5, PAGES - 5]
