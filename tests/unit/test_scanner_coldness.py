"""What counts as cold, against a clock that the test moves."""

from __future__ import annotations

import numpy as np
import pytest

from samepage_scanner.coldness import Coldness

PAGES = 256 * 3 + 1
IDLE = 10.0


class Clock:
    """A clock."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coldness(clock: Clock) -> Coldness:
    coldness = Coldness(PAGES, clock)
    coldness.looked(0, np.ones(4, np.bool_))
    return coldness


def changed(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.isin(np.arange(4), blocks)


def cold(coldness: Coldness) -> list[int]:
    return np.flatnonzero(coldness.cold(IDLE)).tolist()


def test_blocks_that_stand_still_are_cold(clock: Clock, coldness: Coldness) -> None:
    assert cold(coldness) == []
    clock.now += 6
    coldness.looked(0, changed(1))
    clock.now += 4
    assert cold(coldness) == [0, 2, 3]
    clock.now += 6
    assert cold(coldness) == [0, 1, 2, 3]


@pytest.mark.parametrize("tracked", [True, False])
def test_what_comes_back_is_left_alone_for_longer_and_longer(
    clock: Clock, coldness: Coldness, tracked: bool
) -> None:
    wait = IDLE
    for _ in range(4):
        clock.now += wait - 1
        assert 0 not in cold(coldness)
        clock.now += 1
        assert 0 in cold(coldness)
        coldness.evicted(np.array([0]), tracked)
        clock.now += 1000
        assert 0 not in cold(coldness)
        if not tracked:
            coldness.looked(0, changed(0))
            clock.now += 1000
            assert 0 not in cold(coldness)
        coldness.looked(0, changed(0))
        wait *= 2
    assert cold(coldness) == [1, 2, 3]
