"""Which pages fit a slot, who leads beyond it, and which slots belong together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samepage.daemon.config import ConfigError
from samepage_merger.config import Config
from samepage_merger.runs import ranks
from samepage_merger.sharers import Families, _led

NUMBERS = st.lists(st.integers(0, 5), max_size=40)


@given(NUMBERS)
def test_ranks_count_the_equal_ones_before(numbers: list[int]) -> None:
    expected = [numbers[:at].count(number) for at, number in enumerate(numbers)]
    assert ranks(np.array(numbers, np.int64)).tolist() == expected


@given(NUMBERS.filter(bool), st.integers(1, 7))
def test_leaders_are_as_few_as_can_be_and_none_has_too_many(numbers: list[int], cap: int) -> None:
    families = np.array(numbers, np.int64)
    leads, of_lead = _led(families, cap)
    assert np.count_nonzero(leads) == sum(-(-numbers.count(each) // cap) for each in set(numbers))
    places = np.flatnonzero(leads)
    assert (families[places[of_lead]] == families).all()
    assert (places[of_lead] <= np.arange(families.size)).all()
    assert of_lead[places].tolist() == list(range(places.size))
    assert np.bincount(of_lead).max() <= cap


def test_families_follow_their_newest_slot_and_are_forgotten() -> None:
    families = Families()
    full = np.array([3, 7], np.int64)
    assert families.newest(full).tolist() == [3, 7]
    families.add(full, np.array([10, 11], np.int64))
    families.add(np.array([10, 3], np.int64), np.array([12, 13], np.int64))
    assert families.newest(np.array([3, 10, 12, 13, 7, 5], np.int64)).tolist() == [
        *[13] * 4,
        11,
        5,
    ]
    families.forget(np.array([3, 11], np.int64))
    assert families.newest(np.array([10, 7], np.int64)).tolist() == [13, 7]
    families.forget(np.array([7, 10, 12, 13], np.int64))
    assert not families


def test_a_cap_of_one_is_refused() -> None:
    for cap in (0, 2, 256):
        assert Config(node="test", sharers_max=cap).sharers_max == cap
    with pytest.raises(ConfigError, match="sharers_max must be 0, or 2 to"):
        Config(node="test", sharers_max=1)
