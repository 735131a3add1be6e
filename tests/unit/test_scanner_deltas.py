"""What the index is told must add up to what the host holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from samepage.daemon.peers import Peer
from samepage.daemon.wire import PageState
from samepage_scanner import deltas, pages
from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Arena, Books
from samepage_scanner.deltas import collect, distinct_parts, forget
from samepage_scanner.pages import HAS_STABLE_FINGERPRINT

DOMAIN = "default"
PAGES = 12
SECRET = b"sixteen bytes or more"
LOOK = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([*PageState, PageState.PRIVATE])),
    min_size=1,
    max_size=PAGES,
)


def as_set(fingerprints: fp.Fingerprints) -> set[tuple[int, ...]]:
    """The fingerprints, which must be distinct."""
    found = set(map(tuple, fingerprints.tolist()))
    assert len(found) == len(fingerprints)
    return found


def stable(books: Books) -> set[tuple[int, ...]]:
    held: set[tuple[int, ...]] = set()
    for arena in books.arenas():
        chosen = arena.pages.fingerprints[HAS_STABLE_FINGERPRINT[arena.pages.flags]]
        held |= set(map(tuple, chosen.tolist()))
    return held


def open_arena(books: Books, count: int = PAGES) -> Arena:
    peer = Peer.__new__(Peer)
    peer.pid = 0
    books.connect(peer)
    arena = books.open(peer, 1, "a", DOMAIN, count)
    arena.known_to_index = True
    return arena


def sampled(content: tuple[int, ...], bits: int) -> bool:
    """Whether a fingerprint, read as its bytes are sent, ends with so many zeros."""
    packed = np.array([content], "<u8").tobytes()
    return int.from_bytes(packed, "big") % (1 << bits) == 0


class Index(RuleBasedStateMachine):
    """A host whose pages change, and an index that is told now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(SECRET, 1 << 20)
        self.open: list[Arena] = []
        self.known: set[tuple[int, ...]] = set()
        self.bits = 0

    @initialize()
    def begin(self) -> None:
        self.open_arena()

    @rule()
    def open_arena(self) -> None:
        self.open.append(open_arena(self.books))

    @rule(data=st.data(), look=LOOK, times=st.integers(1, 2))
    def look(self, data: st.DataObject, look: list[tuple[int, PageState]], times: int) -> None:
        if not self.open:
            return
        arena = data.draw(st.sampled_from(self.open))
        states = np.array([state for _, state in look], np.uint8)
        for _ in range(times):
            # Small numbers in the last byte, where the lowest bits are.
            fresh = np.array([(1, content << 56) for content, _ in look], "<u8")
            self.books.update(arena, np.arange(len(fresh)), fresh, states)

    @rule(data=st.data())
    def close_arena(self, data: st.DataObject) -> None:
        if self.open:
            arena = data.draw(st.sampled_from(self.open))
            self.open.remove(arena)
            self.books.close(arena)

    @rule(limit=st.integers(1, 30))
    def tell(self, limit: int) -> None:
        """Collect until nothing is left; then the index holds exactly what is stable here."""
        self.books.bury()
        complete = False
        while not complete and (domain := self.books.domains.get(DOMAIN)) is not None:
            delta = collect(domain, limit, self.bits)
            added, removed = as_set(delta.added), as_set(delta.removed)
            assert not added & self.known
            assert removed <= self.known
            self.known = (self.known | added) - removed
            complete = delta.complete
        assert self.known == {
            content for content in stable(self.books) if sampled(content, self.bits)
        }
        self.books.bury()
        assert (DOMAIN in self.books.domains) == bool(self.open)

    @rule(bits=st.integers(0, 3))
    def sample(self, bits: int) -> None:
        self.bits = bits

    @rule()
    def lose(self) -> None:
        """The index lost everything."""
        self.known.clear()
        self.books.bury()
        for domain in self.books.domains.values():
            forget(domain)


TestIndex = Index.TestCase


@pytest.fixture(params=[pages.BLOCK, 5])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(pages, "BLOCK", request.param)
    monkeypatch.setattr(deltas, "_PART_PAGES", request.param)
    yield request.param


def test_large_arenas_are_collected_in_steps(block: int) -> None:
    books = Books(SECRET, 1 << 20)
    arena = open_arena(books, 40)
    for _ in range(2):
        fresh = np.array([(content, 1) for content in range(40)], "<u8")
        books.update(arena, np.arange(40), fresh, np.full(40, PageState.PRIVATE, np.uint8))
    steps = [collect(arena.domain, 15) for _ in range(3)]
    assert [len(step.added) for step in steps] == [15, 15, 10]
    assert [step.complete for step in steps] == [False, False, True]
    assert set.union(*(as_set(step.added) for step in steps)) == stable(books)


def test_distinct_parts_are_all_pages_once(block: int) -> None:
    books = Books(SECRET, 1 << 20)
    contents = np.array([(number % 17, number % 17) for number in range(100)], "<u8")
    for _ in range(2):
        arena = open_arena(books, 100)
        books.update(
            arena, np.arange(100), contents.copy(), np.full(100, PageState.PRIVATE, np.uint8)
        )
    parts = [as_set(part) for part in distinct_parts([one.pages for one in books.arenas()])]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 17
