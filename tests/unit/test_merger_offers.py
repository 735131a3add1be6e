"""Stretches that are offered: their bytes stay for as long as somebody reads them."""

from __future__ import annotations

import numpy as np

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.offers import Offers, Rows


async def offered(offers: Offers, first: int, seed: int) -> tuple[Rows, Digests]:
    """Offer four pages, the second of zeros; return their buffer and digests."""
    rng = np.random.default_rng(seed)
    data = await offers.buffer()
    data[:4] = rng.integers(0, 256, (4, PAGE_SIZE), np.uint8)
    digests = rng.integers(0, 256, (4, 32), np.uint8)
    digests[1] = 0
    offers.add(first, digests, np.zeros((4, 16), np.uint8), data)
    return data, digests


async def test_pages_that_follow_each_other_are_one_part() -> None:
    offers = Offers()
    data, digests = await offered(offers, 0, 1)
    with offers.find(digests[[2, 3, 0]]) as parts:
        assert parts is not None
        assert [bytes(part) for part in parts] == [data[2:4].tobytes(), data[0].tobytes()]


async def test_stretches_that_have_not_all_of_it_give_nothing() -> None:
    offers = Offers()
    _, first = await offered(offers, 0, 1)
    _, second = await offered(offers, 4, 2)
    other = first[:1].copy()
    other[0, 31] ^= 1
    for wanted in (np.concatenate((first[:1], second[:1])), other):
        with offers.find(wanted) as parts:
            assert parts is None


async def test_a_buffer_is_used_again_when_its_stretch_was_taken() -> None:
    offers = Offers()
    data, _ = await offered(offers, 0, 1)
    offers.taken(0)
    assert await offers.buffer() is data


async def test_what_is_read_stays_when_its_stretch_was_taken() -> None:
    offers = Offers()
    data, digests = await offered(offers, 0, 1)
    with offers.find(digests[:1]) as parts:
        assert parts is not None
        before = bytes(parts[0])
        offers.taken(0)
        other, _ = await offered(offers, 4, 2)
        assert other is not data
        assert bytes(parts[0]) == before
    with offers.find(digests[:1]) as parts:
        assert parts is None
