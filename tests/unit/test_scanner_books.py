"""What the scanner remembers of pages, arenas and domains."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from samepage.daemon.peers import Peer
from samepage.daemon.wire import PageState
from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Arena, Books, BooksFullError
from samepage_scanner.pages import PUBLISHED, STABLE, STATE, Flags, Pages

ABSENT, PRIVATE, SHARED, ZERO = PageState
SECRET = b"sixteen bytes or more"

# In a process of its own: memory that others have freed before would count, too.
_LOOK_AT_ABSENT_PAGES = """
import numpy as np
from samepage_scanner import fingerprints as fp
from samepage_scanner.pages import Pages

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

before = resident()
pages = Pages(1 << 26)
for first in range(0, 1 << 22, 1 << 14):
    numbers = np.arange(first, first + (1 << 14))
    pages.update(numbers, fp.empty(1 << 14), np.zeros(1 << 14, np.uint8))
print(resident() - before)
"""


def look(
    contents: list[int], states: list[PageState], first: int = 0
) -> tuple[fp.Indices, fp.Fingerprints, Flags]:
    fresh = np.array([(content, 1) for content in contents], "<u8")
    return np.arange(first, first + len(contents)), fresh, np.array(states, np.uint8)


def stable(pages: Pages) -> list[bool]:
    return [bool(flags & STABLE) for flags in pages.flags]


def open_arena(books: Books, name: str = "a", domain: str = "default", pages: int = 4) -> Arena:
    """An arena of an agent of its own. The books only hold on to a peer."""
    peer = Peer.__new__(Peer)
    peer.pid = 0
    books.connect(peer)
    return books.open(peer, 1, name, domain, pages)


def test_page_is_stable_when_it_stood_still_since_the_last_look() -> None:
    pages = Pages(4)
    pages.update(*look([1, 2, 0, 0], [PRIVATE, PRIVATE, ZERO, ABSENT]))
    assert stable(pages) == [False, False, False, False]
    pages.update(*look([1, 3, 0, 0], [PRIVATE, PRIVATE, ZERO, ABSENT]))
    assert stable(pages) == [True, False, True, False]
    pages.update(*look([1, 3, 4, 0], [PRIVATE, PRIVATE, PRIVATE, ZERO]))
    assert stable(pages) == [True, True, False, False]


def test_shared_page_is_stable_at_once() -> None:
    pages = Pages(1)
    pages.update(*look([1], [SHARED]))
    assert stable(pages) == [True]


def test_first_page_that_looks_like_nothing_is_not_stable() -> None:
    """An agent may claim a fingerprint of zeros for a page that it never showed before."""
    pages = Pages(1)
    pages.update(np.arange(1), np.zeros((1, 2), "<u8"), np.array([PRIVATE], np.uint8))
    assert stable(pages) == [False]


def test_look_counts_what_was_written() -> None:
    pages = Pages(3)
    assert pages.update(*look([1, 2, 3], [PRIVATE] * 3)).differs.sum() == 3
    assert pages.update(*look([1, 9, 3], [PRIVATE] * 3)).differs.sum() == 1
    assert pages.update(*look([9], [PRIVATE], 1)).differs.sum() == 0


def test_look_matters_only_when_matching_could_change() -> None:
    pages = Pages(2)
    assert pages.update(*look([1, 2], [PRIVATE] * 2)).matters
    assert pages.update(*look([1, 3], [PRIVATE] * 2)).matters  # page 0 is stable now
    assert not pages.update(*look([1, 4], [PRIVATE] * 2)).matters  # page 1 never is
    assert pages.update(*look([1, 4], [PRIVATE] * 2)).matters  # now it is
    assert not pages.update(*look([1, 4], [PRIVATE] * 2)).matters
    assert pages.update(*look([1, 4], [SHARED, PRIVATE])).matters
    assert pages.update(*look([5, 4], [SHARED, PRIVATE])).matters


def test_lost_published_fingerprints_retire() -> None:
    pages = Pages(3)
    pages.update(*look([1, 2, 3], [PRIVATE] * 3))
    pages.flags[:2] |= PUBLISHED
    change = pages.update(*look([9, 2, 9], [PRIVATE] * 3))
    assert change.retired.tolist() == [[1, 1]]
    assert ((pages.flags & PUBLISHED) != 0).tolist() == [False, True, False]
    change = pages.update(*look([9, 0, 9], [PRIVATE, ZERO, PRIVATE]))
    assert change.retired.tolist() == [[2, 1]]


def test_books_cost_17_bytes_a_page() -> None:
    pages = Pages(1000)
    assert pages.fingerprints.nbytes + pages.flags.nbytes == 17_000
    assert sys.getsizeof(pages) < 100


def test_huge_arena_that_was_never_touched_costs_nothing() -> None:
    """2**26 pages of books would be more than a GiB; looking at absent pages must not write."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOK_AT_ABSENT_PAGES], check=True, stdout=subprocess.PIPE
    )
    assert int(done.stdout) < 8 << 20


def test_arenas_by_domain() -> None:
    books = Books(SECRET, 100)
    first, second = open_arena(books, "a"), open_arena(books, "b")
    other = open_arena(books, "a", "other")
    assert books.domains["default"].arenas == [first, second]
    assert books.domains["default"].find("a") == [first]
    assert first.domain is second.domain
    assert first.domain.seed != other.domain.seed
    assert first.domain.identity != other.domain.identity
    assert list(books.arenas()) == [first, second, other]
    assert books.pages == 12


def test_disconnect_closes_arenas_and_empty_domains_go() -> None:
    books = Books(SECRET, 100)
    first, second = open_arena(books, "a"), open_arena(books, "b")
    books.disconnect(first.agent.peer)
    assert first.closed
    assert books.domains["default"].dirty
    assert books.domains["default"].arenas == [second]
    books.disconnect(second.agent.peer)
    assert not books.domains
    assert not books.agents
    assert books.pages == 0


def test_closed_arena_is_kept_until_the_index_can_be_told() -> None:
    books = Books(SECRET, 100)
    arena = open_arena(books)
    books.update(arena, *look([1, 2, 3, 4], [PRIVATE] * 4))
    arena.pages.flags[1:3] |= PUBLISHED
    arena.known_to_index = True
    books.close(arena)
    books.bury()
    [retired] = books.domains["default"].retired
    assert retired.tolist() == [[2, 1], [3, 1]]
    books.domains["default"].retired.clear()
    books.bury()
    assert not books.domains


@pytest.mark.parametrize("pages", [97, 1 << 36])
def test_books_are_full(pages: int) -> None:
    books = Books(SECRET, 100 if pages < 100 else 1 << 60)
    open_arena(books)
    with pytest.raises(BooksFullError):
        open_arena(books, "b", pages=pages)
    assert [arena.name for arena in books.arenas()] == ["a"]


def test_scanned_pages_are_counted_without_absent_ones() -> None:
    books = Books(SECRET, 100)
    arena = open_arena(books)
    books.update(arena, *look([1, 2, 3, 4], [PRIVATE, ABSENT, SHARED, ZERO]))
    assert books.pages_scanned == 3
    assert arena.pages.count(SHARED) == 1
    assert (arena.pages.flags & STATE).tolist() == [PRIVATE, ABSENT, SHARED, ZERO]
