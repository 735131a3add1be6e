"""The catalog of slots by digest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from helpers.merger_host import open_directory, store_directory

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.books import Books
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.catalog import Catalog
from samepage_merger.cluster.digests import ZERO_DIGEST, Digester, are_zero, parse_digests
from samepage_merger.cluster.keys import keys_of
from samepage_merger.pagemap import PRIVATE
from samepage_merger.runs import Int64s
from samepage_merger.store import Store

KEY = bytes(range(32))


@pytest.fixture
def directory() -> Iterator[Path]:
    with store_directory() as path:
        yield path


@pytest.fixture
def store(directory: Path) -> Iterator[Store]:
    stores = open_directory(directory)
    yield stores.open(bytes(16))
    stores.close()


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def catalog(store: Store, books: Books) -> Catalog:
    return Catalog(books, store, Digester(KEY), store.free)


def random_pages(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count * PAGE_SIZE)


def fill(store: Store, books: Books, data: bytes) -> tuple[Int64s, Digests]:
    """Put pages into fresh slots, which are held; return slots and digests."""
    count = len(data) // PAGE_SIZE
    slots = store.reserve(count) + np.arange(count)
    books.add(slots)
    store.write(int(slots[0]), data)
    return slots, Digester(KEY).pages(data)


def test_zero_page_has_the_digest_of_zeros() -> None:
    digester = Digester(KEY)
    page = bytes(PAGE_SIZE - 1) + b"\1"
    digests = digester.pages(bytes(PAGE_SIZE) + page)
    assert are_zero(digests).tolist() == [True, False]
    assert digester.page(bytes(PAGE_SIZE)) == ZERO_DIGEST
    assert digester.page(page) == digests[1].tobytes() != Digester(bytes(32)).page(page)


def test_digests_are_blake3() -> None:
    data = random_pages(21) + b"".join(bytes([byte]) * PAGE_SIZE for byte in range(1, 5))
    pages = [data[low : low + PAGE_SIZE] for low in range(0, len(data), PAGE_SIZE)]
    for count in range(len(pages) + 1):
        digests = Digester(KEY).pages(data[: count * PAGE_SIZE])
        assert [row.tobytes() for row in digests] == [
            blake3(page, key=KEY).digest() for page in pages[:count]
        ]


async def test_many_pages_are_hashed_in_threads_with_the_same_result() -> None:
    digester = Digester(KEY)
    data = random_pages(600)
    apart = await digester.pages_apart(data)
    assert apart.tobytes() == b"".join(
        digester.page(data[low : low + PAGE_SIZE]) for low in range(0, len(data), PAGE_SIZE)
    )


async def test_finds_every_slot_of_many_batches(
    catalog: Catalog, store: Store, books: Books
) -> None:
    batches = [
        fill(store, books, random_pages(size, seed)) for seed, size in enumerate(range(1, 40))
    ]
    for slots, digests in batches:
        catalog.add(keys_of(digests), slots)
        catalog.add(keys_of(digests), slots)
    everything = np.concatenate([slots for slots, _ in batches])
    assert len(catalog) == everything.size
    digests = np.concatenate([digests for _, digests in batches])
    async with catalog.found(digests) as found:
        assert found.tolist() == everything.tolist()
    assert catalog.look_up(digests).tolist() == everything.tolist()
    assert catalog.keys(everything).tolist() == keys_of(digests).tolist()
    assert catalog.page(digests[7].tobytes()) == store.read(int(everything[7]), 1)
    assert catalog.page(bytes(31) + b"\1") is None


async def test_equal_key_with_other_bytes_is_not_found(
    catalog: Catalog, store: Store, books: Books
) -> None:
    slots, digests = fill(store, books, random_pages(2))
    forged = digests.copy()
    forged[0, 20] ^= 1
    catalog.add(keys_of(forged), slots)
    async with catalog.found(forged) as found:
        assert found.tolist() == [PRIVATE, int(slots[1])]


async def test_second_slot_of_the_same_bytes_is_found_when_the_first_is_gone(
    catalog: Catalog, store: Store, books: Books
) -> None:
    data = random_pages(3)
    slots, digests = fill(store, books, data)
    again, _ = fill(store, books, data)
    catalog.add(keys_of(digests), slots)
    catalog.add(keys_of(digests), again)
    books.keep(again)
    store.free(books.release(1))
    async with catalog.found(digests) as found:
        assert found.tolist() == again.tolist()


async def test_found_slots_are_not_freed_while_they_are_used(
    catalog: Catalog, store: Store, books: Books
) -> None:
    slots, digests = fill(store, books, random_pages(3))
    catalog.add(keys_of(digests), slots)
    async with catalog.found(digests) as found:
        assert books.release(1).size == 0
        assert store.resident_bytes() == 3 * PAGE_SIZE
        assert Digester(KEY).pages(store.read_all(found)).tolist() == digests.tolist()
    assert store.resident_bytes() == 0
    async with catalog.found(digests) as found:
        assert not found.any()


def test_freed_slots_are_dropped(catalog: Catalog, store: Store, books: Books) -> None:
    for seed in range(20):
        slots, digests = fill(store, books, random_pages(8, seed))
        catalog.add(keys_of(digests), slots)
        store.free(books.release(seed + 1))
    assert len(catalog) <= 16


def test_digests_are_parsed_from_bytes() -> None:
    assert parse_digests(bytes(64)).shape == (2, 32)
