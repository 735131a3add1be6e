"""Matching, checked against a naive model, and its choice of leaders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage.daemon.wire import PageState
from samepage_scanner import fingerprints, match, pages
from samepage_scanner.match import NO_LEADER, RUN, Match, Runs
from samepage_scanner.pages import STABLE, Pages

ABSENT, PRIVATE, SHARED, ZERO = PageState
Page = tuple[int, PageState, bool]
Place = tuple[int, int]


def make(arena: Sequence[Page]) -> Pages:
    """An arena from (content, state, stable) by page."""
    result = Pages(len(arena))
    for number, (content, state, stable) in enumerate(arena):
        if state in (PRIVATE, SHARED):
            # Contents differ in one half only, either of them.
            result.fingerprints[number] = (content // 2, content % 2)
        result.flags[number] = state | (STABLE if stable else 0)
    return result


def private(contents: Sequence[int]) -> list[Page]:
    return [(content, PRIVATE, True) for content in contents]


def pairs(runs: Runs) -> Iterator[tuple[Place, Place]]:
    """(follower, leader) of every page."""
    for leader_arena, follower_arena, leader, follower, count in runs.tolist():
        for step in range(count):
            yield (follower_arena, follower + step), (leader_arena, leader + step)


def spans(runs: Runs) -> set[tuple[Place, Place, int]]:
    """(follower, leader, count) of every run."""
    return {((fa, fp), (la, lp), n) for la, fa, lp, fp, n in runs.tolist()}


@pytest.fixture(params=["usual", "tiny blocks", "colliding keys"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same work in many blocks and parts, and with sort keys that collide."""
    if request.param == "tiny blocks":
        monkeypatch.setattr(pages, "BLOCK", 3)
        monkeypatch.setattr(match, "_PART_PAGES", 4)
    if request.param == "colliding keys":
        monkeypatch.setattr(fingerprints, "_FACTOR", np.uint64(0))
    return str(request.param)


STATES = st.sampled_from([ABSENT, PRIVATE, PRIVATE, PRIVATE, PRIVATE, SHARED, ZERO])
CHANGED = st.tuples(st.integers(0, 12), STATES, st.booleans())
# Stretches of one content in order, with single pages changed: what long runs are made of.
STRETCH = st.builds(
    lambda first, count: private(range(first, first + count)), st.integers(0, 8), st.integers(1, 6)
)
ARENA = st.lists(STRETCH | st.lists(CHANGED, max_size=3), max_size=5).map(
    lambda pieces: [page for piece in pieces for page in piece]
)


@given(arenas=st.lists(ARENA, max_size=5), waive=st.booleans())
def check_against_model(arenas: list[list[Page]], waive: bool) -> None:
    found = match.match([make(arena) for arena in arenas], waive=waive)
    groups: dict[int, dict[Place, PageState]] = defaultdict(dict)
    zeros = set()
    for number, arena in enumerate(arenas):
        for page, (content, state, stable) in enumerate(arena):
            if state in (PRIVATE, SHARED) and (stable or waive):
                groups[content][number, page] = state
            if state is ZERO and (stable or waive):
                zeros.add((number, page))
    check_followers(found, groups)
    check_unique(found, groups, len(arenas))
    assert sorted(follower for follower, _ in pairs(found.zero)) == sorted(zeros)
    assert set(found.zero["leader_arena"].tolist()) <= {NO_LEADER}
    check_runs(found.equal)
    check_runs(found.zero)


def check_followers(found: Match, groups: dict[int, dict[Place, PageState]]) -> None:
    """Every follower is equal to its leader; every page that can be merged is, once."""
    led_by = dict(pairs(found.equal))
    assert len(led_by) == found.equal["count"].sum()
    for members in groups.values():
        shared = {place for place, state in members.items() if state is SHARED}
        candidates = set(members) - shared
        followers = candidates & set(led_by)
        leaders = {led_by.pop(place) for place in followers}
        assert leaders <= set(members)
        assert not leaders & followers
        if shared:
            assert followers == candidates
            assert leaders <= shared
        else:
            assert followers | leaders == (candidates if len(candidates) > 1 else set())
            assert len(leaders) <= 1
    assert not led_by


def check_unique(found: Match, groups: dict[int, dict[Place, PageState]], arenas: int) -> None:
    unique = [0] * arenas
    for members in groups.values():
        for (arena, _), state in members.items():
            unique[arena] += len(members) == 1 and state is PRIVATE
    assert found.unique.tolist() == unique


def check_runs(runs: Runs) -> None:
    """Runs are maximal, and longest first."""
    counts = runs["count"].tolist()
    assert 0 not in counts
    assert counts == sorted(counts, reverse=True)
    begins = {(follower, leader) for follower, leader, _ in spans(runs)}
    for (follower_arena, follower), (leader_arena, leader), count in spans(runs):
        next_leader = 0 if leader_arena == NO_LEADER else leader + count
        following = (follower_arena, follower + count), (leader_arena, next_leader)
        assert following not in begins


def test_matches_what_the_model_does(size: str) -> None:
    check_against_model()


def test_record_is_the_wire_format() -> None:
    found = match.match([make(private([9, 8, 7])), make(private([1, 8, 7]))])
    assert RUN.itemsize == 32
    assert found.equal.tobytes() == bytes.fromhex(
        "00000000 01000000 0100000000000000 0100000000000000 0200000000000000"
    )


def test_copies_are_one_run_each(size: str) -> None:
    found = match.match([make(private(range(50)))] * 3)
    assert spans(found.equal) == {((1, 0), (0, 0), 50), ((2, 0), (0, 0), 50)}


def test_shifted_copy_is_one_run(size: str) -> None:
    found = match.match([make(private(range(50))), make(private([99, 98, *range(10, 40)]))])
    assert spans(found.equal) == {((1, 2), (0, 10), 30)}
    assert found.unique.tolist() == [20, 2]


def test_runs_within_one_arena(size: str) -> None:
    found = match.match([make(private([*range(10), 50, *range(10)]))])
    assert spans(found.equal) == {((0, 11), (0, 0), 10)}


def test_same_page_over_and_over(size: str) -> None:
    found = match.match([make(private([7] * 20))])
    assert {leader for _, leader in pairs(found.equal)} == {(0, 0)}
    assert len(dict(pairs(found.equal))) == 19


def test_scattered_copy_does_not_lead(size: str) -> None:
    """Every second page of arena 0 changed: it must not cut the other two to pieces."""
    broken = [content if content % 2 else 100 + content for content in range(40)]
    found = match.match([make(private(contents)) for contents in (broken, range(40), range(40))])
    assert ((2, 0), (1, 0), 40) in spans(found.equal)
    assert len(found.equal) == 1 + 20


def test_longest_stretch_leads(size: str) -> None:
    found = match.match([make(private(contents)) for contents in (range(10), range(30), range(30))])
    assert spans(found.equal) == {((2, 0), (1, 0), 30), ((0, 0), (1, 0), 10)}


def test_shared_pages_lead(size: str) -> None:
    shared: list[Page] = [(content, SHARED, True) for content in range(20)]
    found = match.match([make(private(range(20))), make(shared), make(shared)])
    assert spans(found.equal) == {((0, 0), (1, 0), 20)}


def test_shared_pages_that_keep_the_run_together_lead(size: str) -> None:
    """Arena 0 shares only half of what arena 1 shares: arena 1 leads for all."""
    half: list[Page] = [(content, SHARED, True) for content in range(20)]
    all_of_it: list[Page] = [(content, SHARED, True) for content in range(40)]
    found = match.match([make(half), make(all_of_it), make(private(range(40)))])
    assert spans(found.equal) == {((2, 0), (1, 0), 40)}


def test_unstable_pages_wait_unless_waived(size: str) -> None:
    arenas = [make([(content, PRIVATE, False) for content in range(5)]) for _ in range(2)]
    assert not len(match.match(arenas).equal)
    assert spans(match.match(arenas, waive=True).equal) == {((1, 0), (0, 0), 5)}


def test_zero_pages_have_no_leader(size: str) -> None:
    found = match.match([make([(0, ZERO, True)] * 7 + private([1]) + [(0, ZERO, True)] * 9)])
    assert found.zero.tolist() == [(NO_LEADER, 0, 0, 8, 9), (NO_LEADER, 0, 0, 0, 7)]
    assert not len(found.equal)


def test_nothing_at_all() -> None:
    found = match.match([])
    assert (len(found.equal), len(found.zero), len(found.unique)) == (0, 0, 0)


def test_short_runs_are_left_alone_and_unique(size: str) -> None:
    contents = [*range(10), 100, 20, 21, 101, 30]
    other = [*range(10), 200, 20, 21, 201, 30]
    arenas = [make(private(pages)) for pages in (contents, other)]
    assert match.match(arenas).unique.tolist() == [2, 2]
    found = match.match(arenas, min_run=3)
    assert spans(found.equal) == {((1, 0), (0, 0), 10)}
    assert found.unique.tolist() == [5, 5]


def test_leader_of_a_short_and_of_a_long_run_is_not_unique(size: str) -> None:
    arenas = [make(private(pages)) for pages in (range(10), range(10), [50, 4, 51])]
    found = match.match(arenas, min_run=2)
    assert spans(found.equal) == {((1, 0), (0, 0), 10)}
    assert found.unique.tolist() == [0, 0, 3]


def test_shared_leader_of_short_runs_is_not_unique(size: str) -> None:
    shared: list[Page] = [(5, PageState.SHARED, True)]
    found = match.match([make(shared), make(private([5, 6]))], min_run=2)
    assert not len(found.equal)
    assert found.unique.tolist() == [0, 2]


def test_short_runs_of_zeros_are_given_back(size: str) -> None:
    arena = make([*private([1]), (0, ZERO, True), *private([2])])
    assert spans(match.match([arena], min_run=9).zero) == {((0, 1), (match.NO_LEADER, 0), 1)}


def test_mute_arenas_only_lead_with_what_they_share(size: str) -> None:
    mute: list[Page] = [(1, PageState.SHARED, True), (2, PageState.PRIVATE, True), (0, ZERO, True)]
    arenas = [make(mute), make(private([1, 2])), make(private([1, 2]))]
    found = match.match(arenas, mute=[0])
    assert spans(found.equal) == {((1, 0), (0, 0), 1), ((2, 0), (0, 0), 1), ((2, 1), (1, 1), 1)}
    assert not len(found.zero)
    assert found.unique.tolist() == [0, 0, 0]


def test_followers_whose_equals_are_all_in_their_own_process(size: str) -> None:
    """Shared pages of others count too, though nobody follows them."""
    shared: list[Page] = [(3, PageState.SHARED, True), (9, PageState.SHARED, True)]
    arenas = [
        make(private([1, 1, 2, 2, 9])),
        make([*private([1, 2, 4]), *shared]),
        make([*private([2, 3]), (3, PageState.SHARED, True), *private([5, 5])]),
    ]
    found = match.match(arenas, processes=[7, 7, 8])
    assert int(found.equal["count"].sum()) == 2 + 3 + 1 + 1 + 1
    # of its ones and twos, and the nine that its own process shares; not the twos, that two have
    assert int(found.same_process[:2].sum()) == 2 + 1
    assert found.same_process[2] == 1  # a five; its three is shared by both processes
    assert match.match(arenas).same_process.tolist() == [0, 0, 0]
