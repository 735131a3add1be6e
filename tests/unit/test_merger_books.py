"""The books against a naive model: references, holds, and what is freed when."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from samepage.daemon import wire
from samepage_merger.books import Books
from samepage_merger.pagemap import PRIVATE, PageMap
from samepage_merger.runs import batches, expand, join, join_extents, within
from samepage_merger.slots import SlotTable

PAGES = 40


def int64s(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


class BooksModel(RuleBasedStateMachine):
    """The same operations on dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books()
        self.maps: dict[int, PageMap] = {}
        self.pages: dict[int, dict[int, int]] = {}
        self.holds: dict[int, set[int]] = {}
        self.keepers: Counter[int] = Counter()
        self.live: set[int] = set()
        self.last_slot = 0
        self.opened = 0

    def referenced(self) -> Counter[int]:
        return Counter(slot for pages in self.pages.values() for slot in pages.values())

    def expect_freed(self, freed: object) -> None:
        """Nothing else than what lost its last reference and hold was freed."""
        held = set(+self.keepers).union(*self.holds.values())
        dead = self.live - set(self.referenced()) - held
        assert isinstance(freed, np.ndarray)
        assert freed.tolist() == sorted(dead)
        self.live -= dead

    @rule()
    def open(self) -> None:
        self.opened += 1
        number = self.opened
        self.maps[number] = self.books.open(PAGES)
        self.pages[number] = {}

    @rule(count=st.integers(1, 30), gap=st.integers(0, 5))
    def add(self, count: int, gap: int) -> None:
        first = self.last_slot + 1 + gap
        self.last_slot = first + count - 1
        slots = np.arange(first, first + count)
        hold = self.books.add(slots)
        self.holds[hold] = set(slots.tolist())
        self.live |= set(slots.tolist())

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from(sorted(self.holds)))
        del self.holds[hold]
        self.expect_freed(self.books.release(hold))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.live)), min_size=1, max_size=9))
        self.holds[self.books.hold(int64s(*slots))] = set(slots)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slots = data.draw(st.sets(st.sampled_from(sorted(self.live)), min_size=1, max_size=9))
        self.books.keep(int64s(*sorted(slots)))
        self.keepers.update(slots)

    @precondition(lambda self: +self.keepers)
    @rule(data=st.data())
    def unkeep(self, data: st.DataObject) -> None:
        slots = data.draw(st.sets(st.sampled_from(sorted(+self.keepers)), min_size=1, max_size=9))
        self.keepers.subtract(slots)
        self.expect_freed(self.books.unkeep(int64s(*sorted(slots))))

    @precondition(lambda self: self.live and self.maps)
    @rule(data=st.data())
    def map(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.maps)))
        pages = data.draw(st.sets(st.integers(0, PAGES - 1), min_size=1))
        slots = [data.draw(st.sampled_from([PRIVATE, *sorted(self.live)])) for _ in pages]
        for page, slot in zip(pages, slots, strict=True):
            self.pages[number].pop(page, None)
            if slot != PRIVATE:
                self.pages[number][page] = slot
        freed = self.books.map(self.maps[number], int64s(*pages), int64s(*slots))
        self.expect_freed(freed)

    @precondition(lambda self: self.maps)
    @rule(data=st.data(), first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def unmap(self, data: st.DataObject, first: int, count: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.maps)))
        page_map = self.maps[number]
        pages = page_map.mapped(first, min(count, PAGES - first))
        mine = self.pages[number]
        assert pages.tolist() == sorted(p for p in mine if first <= p < first + count)
        for page in pages.tolist():
            del mine[page]
        self.expect_freed(self.books.unmap(page_map, pages))

    @precondition(lambda self: self.maps)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.maps)))
        del self.pages[number]
        self.expect_freed(self.books.close(self.maps.pop(number)))

    @precondition(lambda self: self.last_slot)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        slots = data.draw(st.sets(st.integers(1, self.last_slot), min_size=1, max_size=9))
        self.books.adopt(int64s(*slots))
        self.live |= slots
        self.holds[self.books.hold(int64s(*slots))] = slots

    @invariant()
    def agrees(self) -> None:
        references = self.referenced()
        table = self.books.table
        live = int64s(*sorted(self.live))
        assert len(table) == len(self.live)
        assert table.live().tolist() == live.tolist()
        assert table.references(live).tolist() == [references[slot] for slot in live.tolist()]
        assert table.total_references() == sum(references.values()) == self.books.shared_pages()
        assert table.referenced() == len(references)
        for number, page_map in self.maps.items():
            mine = self.pages[number]
            assert page_map.shared == len(mine)
            ends = [
                page
                for page in range(PAGES - 1)
                if mine.get(page + 1, 0) != (mine[page] + 1 if page in mine else 0)
            ]
            assert page_map.mappings == len(ends) + 1
            assert page_map.mapped().tolist() == sorted(mine)
            assert page_map.slots(np.arange(PAGES)).tolist() == [
                mine.get(page, PRIVATE) for page in range(PAGES)
            ]
            expected = sum(4096 * (1 - 1 / references[slot]) for slot in mine.values())
            assert abs(self.books.saved_bytes(page_map) - expected) <= 1

    @invariant()
    def reverse_map_agrees(self) -> None:
        for slot in sorted(self.live)[:3]:
            found = {
                number: pages.tolist()
                for page_map, pages in self.books.reverse_map(slot)
                for number, own in self.maps.items()
                if own is page_map
            }
            assert found == {
                number: sorted(page for page, mapped in mine.items() if mapped == slot)
                for number, mine in self.pages.items()
                if slot in mine.values()
            }


TestBooksModel = BooksModel.TestCase
TestBooksModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_references_stay_with_their_slots() -> None:
    table = SlotTable()
    slots = np.arange(1, 5001)
    table.add(slots)
    table.reference(np.repeat(slots, slots % 3))
    table.remove(slots[slots % 7 != 0])
    kept = slots[slots % 7 == 0]
    assert table.live().tolist() == kept.tolist()
    assert table.references(kept).tolist() == (kept % 3).tolist()


def test_a_run_of_slots_is_counted_as_its_slots_are() -> None:
    table, slots = SlotTable(), np.arange(100, 200)
    table.add(slots)
    table.reference(slots)
    table.reference(slots[10:20])
    assert table.unreference(slots[5:15]).tolist() == list(range(105, 110))
    assert table.references(np.arange(98, 112)).tolist() == [0] * 2 + [1] * 5 + [0] * 5 + [1, 1]
    table.remove(slots[:50])
    assert table.contains(np.arange(145, 155)).tolist() == [False] * 5 + [True] * 5
    with pytest.raises(KeyError):
        table.reference(np.arange(149, 152))


def test_memory_follows_what_lives_not_what_was_given() -> None:
    books = Books()
    for first in range(1, 4_000_000, 40_000):
        slots = np.arange(first, first + 20_000)
        hold = books.add(slots)
        assert books.release(hold).size == slots.size
    assert len(books.table) == 0
    assert books.table.nbytes < 4 * 20_000 * 12


def test_a_reference_to_a_dead_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        Books().table.reference(int64s(5))


def test_saved_bytes_of_all_arenas_sum_to_what_is_saved() -> None:
    books = Books()
    hold = books.add(int64s(1, 2))
    arenas = [books.open(4) for _ in range(3)]
    for arena in arenas:
        books.map(arena, int64s(0, 3), int64s(1, 2))
    books.release(hold)
    total = sum(books.saved_bytes(arena) for arena in arenas)
    assert total == pytest.approx((6 - 2) * 4096, abs=len(arenas))


def test_a_huge_arena_costs_nothing_until_it_is_shared() -> None:
    books = Books()
    arena = books.open(2**36)
    hold = books.add(int64s(1))
    books.map(arena, int64s(2**36 - 1), int64s(1))
    assert arena.mapped().tolist() == [2**36 - 1]
    assert arena.mapped(0, 2**35).tolist() == []
    books.release(hold)
    assert books.close(arena).tolist() == [1]


def test_slot_numbers_beyond_32_bits() -> None:
    page_map = PageMap(100)
    page_map.put(int64s(1, 2), int64s(7, 2**32 - 1))
    page_map.put(int64s(50), int64s(2**32))
    page_map.put(int64s(51), int64s(2**40))
    assert page_map.slots(int64s(1, 2, 3, 50, 51)).tolist() == [7, 2**32 - 1, 0, 2**32, 2**40]
    assert page_map.shared == 4


RUNS = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), max_size=20)


class TestRuns:
    @staticmethod
    def arrays(runs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        both = np.array(runs, np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def test_expand(self) -> None:
        assert expand(int64s(5, 1), int64s(3, 2)).tolist() == [5, 6, 7, 1, 2]
        assert expand(int64s(), int64s()).tolist() == []

    @settings(deadline=None)
    @given(runs=RUNS, size=st.integers(1, 100))
    def test_batches_are_the_runs_in_pieces(self, runs: list[tuple[int, int]], size: int) -> None:
        first, count = self.arrays(runs)
        pieces = [
            expand(first[run] + offset, length) for run, offset, length in batches(count, size)
        ]
        assert all(0 < piece.size <= size for piece in pieces)
        joined = np.concatenate([np.empty(0, np.int64), *pieces])
        assert joined.tolist() == [n for f, c in runs for n in range(f, f + c)]

    def test_join(self) -> None:
        first, count = join(int64s(1, 2, 3, 7, 9, 10))
        assert first.tolist() == [1, 7, 9] and count.tolist() == [3, 1, 2]
        assert [part.size for part in join(int64s())] == [0, 0]

    def test_extents_follow_pages_and_slots(self) -> None:
        extents = join_extents(int64s(1, 2, 3, 4, 8), int64s(5, 6, 9, 10, 11))
        assert extents.tolist() == [(1, 2, 5), (3, 2, 9), (8, 1, 11)]
        assert join_extents(int64s(), int64s()).size == 0

    def test_extents_of_the_zero_page_keep_their_slot(self) -> None:
        assert join_extents(int64s(1, 2, 3, 5), int64s(0, 0, 0, 0)).tolist() == [
            (1, 3, 0),
            (5, 1, 0),
        ]

    @pytest.mark.parametrize(
        ("first", "count", "inside"),
        [
            (0, 10, True),
            (9, 1, True),
            (10, 1, False),
            (0, 0, False),
            (0, 11, False),
            (2**64 - 1, 2, False),
            (1, 2**64 - 1, False),
        ],
    )
    def test_within_does_not_overflow(self, first: int, count: int, inside: bool) -> None:
        ranges = np.array([(first, count)], wire.RANGE)
        assert within(ranges["page"], ranges["count"], 10) is inside
