"""Finding pages by fingerprint, against a naive search."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from samepage.daemon.wire import PageState
from samepage_scanner import fingerprints as fp
from samepage_scanner.locate import locate
from samepage_scanner.pages import BLOCK, Pages

ABSENT, PRIVATE, SHARED, ZERO = PageState

#: Of each page: what its fingerprint is made of, and its state.
Look = list[tuple[int, PageState]]

looks = st.lists(st.tuples(st.integers(1, 30), st.sampled_from(list(PageState))), max_size=40)


def fingerprints(contents: list[int]) -> fp.Fingerprints:
    return np.array([(content, content % 3) for content in contents], "<u8").reshape(-1, 2)


def pages_of(look: Look) -> Pages:
    pages = Pages(len(look))
    if look:
        states = np.array([state for _, state in look], np.uint8)
        pages.update(np.arange(len(look)), fingerprints([c for c, _ in look]), states)
    return pages


@given(st.lists(looks, max_size=4), st.lists(st.integers(1, 40), max_size=30))
def test_finds_what_a_naive_search_finds(arenas: list[Look], wanted: list[int]) -> None:
    places = locate([pages_of(look) for look in arenas], fingerprints(wanted))
    there = {content for look in arenas for content, state in look if state in (PRIVATE, SHARED)}
    numbers = [number for number, content in enumerate(wanted) if content in there]
    assert places["fingerprint"].tolist() == numbers
    for number, arena, page in places.tolist():
        content, state = arenas[arena][page]
        assert content == wanted[number]
        assert state in (PRIVATE, SHARED)


def test_place_beyond_the_first_block() -> None:
    pages = Pages(BLOCK + 10)
    at = np.array([BLOCK + 7])
    pages.update(at, fingerprints([5]), np.array([PRIVATE], np.uint8))
    assert locate([Pages(3), pages], fingerprints([4, 5])).tolist() == [(1, 1, BLOCK + 7)]
