"""Which blocks of an arena a pass looks at."""

from __future__ import annotations

import numpy as np

from samepage_scanner.attention import BLOCK_PAGES, STRETCH_PAGES, Attention

BLOCKS = 6


def attention(blocks: int = BLOCKS) -> Attention:
    return Attention(blocks * BLOCK_PAGES)


def look(at: Attention, changed: list[int], rest_max: int = 64, tracked: bool = True) -> list[int]:
    """One pass; the blocks that it looked at."""
    due = at.begin(tracked, everything=False)
    marks = np.isin(np.arange(BLOCKS), changed)
    for first, end in at.stretches(due):
        at.stale[first:end] = False
        at.looked(first, end, marks[first:end], rest_max)
    return np.flatnonzero(due).tolist()


def test_all_is_looked_at_first() -> None:
    at = attention()
    assert at.stale.all()
    assert look(at, [*range(BLOCKS)]) == [*range(BLOCKS)]
    assert look(at, []) == [*range(BLOCKS)]


def test_rest_doubles_up_to_its_limit() -> None:
    at = attention()
    look(at, [0])
    looks = [number for number in range(400) if 0 in look(at, [0])]
    assert np.diff(looks).tolist()[:8] == [1, 3, 5, 9, 17, 33, 65, 65]
    at = attention()
    looks = [number for number in range(100) if 0 in look(at, [0], rest_max=5)]
    assert set(np.diff(looks).tolist()[4:]) == {6}


def test_everything_wakes_what_rests_and_rest_goes_on() -> None:
    at = attention()
    for _ in range(3):
        look(at, [2])
    assert not at.begin(True, everything=False)[2]
    assert at.begin(True, everything=True).all()
    assert not at.begin(True, everything=False)[2]
    assert at.begin(True, everything=False)[2]


def test_interrupted_pass_goes_on_where_it_was_without_tracking() -> None:
    at = attention()
    due = at.begin(False, everything=False)
    assert due.all()
    at.stale[:4] = False
    assert np.flatnonzero(at.begin(False, everything=False)).tolist() == [4, 5]
    at.stale[4:] = False
    assert at.begin(False, everything=False).all()


def test_check_comes_to_every_block_in_turn() -> None:
    at = attention()
    at.stale[:] = False
    times = np.zeros(BLOCKS, int)
    for _ in range(40):
        at.check(0.1)
        times += at.stale
        at.stale[:] = False
    assert set(times.tolist()) == {4}
    at.check(17.0)
    assert at.stale.all()


def test_runs_of_pages_make_their_blocks_stale() -> None:
    at = attention()
    at.stale[:] = False
    at.mark(np.array([0, 2 * BLOCK_PAGES - 1, 5 * BLOCK_PAGES]), np.array([1, 2, BLOCK_PAGES]))
    assert np.flatnonzero(at.stale).tolist() == [0, 1, 2, 5]


def test_stretches_are_bounded_and_end_with_the_arena() -> None:
    at = Attention(2 * STRETCH_PAGES + 7)
    due = at.begin(True, everything=True)
    spans = [at.span(*stretch) for stretch in at.stretches(due)]
    assert spans == [(0, STRETCH_PAGES), (STRETCH_PAGES, STRETCH_PAGES), (2 * STRETCH_PAGES, 7)]


def test_blocks_cost_4_bytes() -> None:
    at = attention(1000)
    arrays = (at.stale, at.unsettled, at.streak, at.rest)
    assert sum(array.nbytes for array in arrays) == 4000
