"""The packed buckets against a plain dict, on a real Valkey and a real Redis."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.index_harness import Books
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from samepage_index.entries import Size
from samepage_index.fingerprints import place
from samepage_index.hosts import NUMBERS, pack_number

from .conftest import Server

DOMAINS = (b"d" * 16, bytes(16))
HOSTS = ("alpha", "beta", "gamma")


def fingerprint(number: int) -> bytes:
    return number.to_bytes(16, "big")


def fingerprints(count: int, seed: int) -> list[bytes]:
    data = random.Random(seed).randbytes(16 * count)
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def fingerprints_in_shard(shard: int, count: int) -> list[bytes]:
    data = np.random.default_rng(1).bytes(16 * 80 * count)
    found = np.flatnonzero(place(data)[0] == shard)[:count].tolist()
    assert len(found) == count
    return [data[16 * at : 16 * at + 16] for at in found]


class Model:
    """What the index should hold: (domain, fingerprint) -> hosts."""

    def __init__(self) -> None:
        self.held: dict[tuple[bytes, bytes], set[str]] = {}

    def publish(self, domain: bytes, host: str, added: list[bytes], removed: list[bytes]) -> int:
        for each in removed:
            hosts = self.held.get((domain, each), set())
            hosts.discard(host)
            if not hosts:
                self.held.pop((domain, each), None)
        elsewhere = sum(bool(self.held.get((domain, each), set()) - {host}) for each in set(added))
        for each in added:
            self.held.setdefault((domain, each), set()).add(host)
        return elsewhere

    def forget(self, host: str) -> None:
        for key in list(self.held):
            self.held[key].discard(host)
            if not self.held[key]:
                del self.held[key]

    def holders(self, domain: bytes) -> dict[bytes, set[str]]:
        return {each: hosts for (where, each), hosts in self.held.items() if where == domain}

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(map(len, self.held.values())), len(self.held)


async def sizes(books: Books) -> tuple[int, int]:
    size = await books.entries.size()
    return size.entries, size.fingerprints


PAGES = st.lists(st.integers(0, 30).map(fingerprint), max_size=20)
BATCHES = st.lists(
    st.tuples(st.sampled_from(DOMAINS), st.sampled_from(HOSTS), PAGES, PAGES), max_size=12
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=BATCHES)
def test_agrees_with_a_dict(
    server: Server, batches: list[tuple[bytes, str, list[bytes], list[bytes]]]
) -> None:
    async def run() -> None:
        model = Model()
        async with Books(server.url) as books:
            server.flush()
            publishers = {host: books.index.publisher() for host in HOSTS}
            for host, publisher in publishers.items():
                await publisher.announce(host, 1, "")
            for domain, host, added, removed in batches:
                held = await publishers[host].publish(domain, b"".join(added), b"".join(removed))
                assert held == model.publish(domain, host, added, removed)
            for domain in DOMAINS:
                universe = [fingerprint(number) for number in range(32)]
                assert await books.holders(domain, universe) == model.holders(domain)
            assert await sizes(books) == model.sizes

    asyncio.run(run())


def chunks(pages: list[bytes], size: int) -> Iterator[bytes]:
    for at in range(0, len(pages), size):
        yield b"".join(pages[at : at + size])


async def test_grows_and_shrinks(books: Books) -> None:
    domain, pages = DOMAINS[0], fingerprints(100_000, seed=1)
    publisher = books.index.publisher()
    await publisher.announce("alpha", 1, "")
    for added in chunks(pages, 30_000):
        assert await publisher.publish(domain, added, b"") == 0
    size = await books.entries.size()
    assert (size.entries, size.fingerprints) == (100_000, 100_000)
    assert size.stored_bytes <= 20 * size.entries
    assert len(await books.holders(domain, pages[:60_000])) == 60_000

    for removed in chunks(pages[1_000:], 30_000):
        await publisher.publish(domain, b"", removed)
    assert await sizes(books) == (1_000, 1_000)
    assert (await books.entries.size()).stored_bytes < size.stored_bytes / 15
    assert set(await books.holders(domain, pages[:60_000])) == set(pages[:1_000])

    await publisher.publish(domain, b"", b"".join(pages[:1_000]))
    assert await books.entries.size() == Size()


async def test_many_holders_of_one_page(books: Books) -> None:
    domain, page = DOMAINS[0], fingerprint(7)
    names = [f"host-{number:03}" for number in range(200)]
    for count, name in enumerate(names):
        publisher = books.index.publisher()
        await publisher.announce(name, 1, "")
        assert await publisher.publish(domain, page, b"") == (count > 0)
    assert await books.holders(domain, [page]) == {page: set(names)}
    assert await sizes(books) == (200, 1)


async def test_entries_that_look_like_others_at_wrong_offsets(books: Books) -> None:
    # Buckets are searched as text: keys and holders that occur across the borders of entries must
    # not be found. With few distinct bytes they occur all the time.
    pages = [fingerprint(number) for number in range(3_000)]
    hosts = ("alpha", "beta")
    model, domain = Model(), DOMAINS[0]
    for host, part in zip(hosts, (pages[:2_000], pages[1_000:]), strict=True):
        publisher = books.index.publisher()
        await publisher.announce(host, 1, "")
        held = await publisher.publish(domain, b"".join(part), b"")
        assert held == model.publish(domain, host, part, [])
    assert await books.holders(domain, pages) == model.holders(domain)
    for host in hosts:
        number = next(h.number for h in await books.hosts.live() if h.name == host)
        for shard in range(64):
            await books.entries.sweep_shard(domain, shard, pack_number(number))
        model.forget(host)
        assert await books.holders(domain, pages) == model.holders(domain)
        assert await sizes(books) == model.sizes


async def test_sweeps_while_others_publish_and_remove(books: Books) -> None:
    """Sweeping goes bucket by bucket while splits and merges move entries about."""
    domain = DOMAINS[0]
    numbers = [11, 12, 13]
    live = b"".join(map(pack_number, numbers))
    leaving, staying, passing = (fingerprints(40_000, seed=seed) for seed in (1, 2, 3))
    for number, pages in ((11, leaving), (12, staying), (13, passing)):
        await books.entries.publish(domain, number, live, b"".join(pages), b"")

    async def sweep() -> int:
        return sum(
            [await books.entries.sweep_shard(domain, shard, pack_number(11)) for shard in range(64)]
        )

    async def churn() -> None:
        for part in chunks(passing, 4_000):
            await books.entries.publish(domain, 13, live, b"", part)

    swept, _ = await asyncio.gather(sweep(), churn())
    assert swept == 40_000
    assert await sizes(books) == (40_000, 40_000)


async def test_sweep_starts_over_when_a_merge_moved_entries(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain, live = DOMAINS[0], pack_number(11) + pack_number(12)
    # All in one shard, so that one call does not sweep all its buckets.
    pages = fingerprints_in_shard(5, 40_000)
    leaving, passing = pages[:4_000], pages[4_000:]
    await books.entries.publish(domain, 11, live, b"".join(leaving), b"")
    await books.entries.publish(domain, 12, live, b"".join(passing), b"")
    sweep_some, calls = books.entries._sweep_some, []

    async def sweep_and_churn(key: bytes, numbers: bytes, first: int) -> list[int]:
        answer = await sweep_some(key, numbers, first)
        calls.append(first)
        if len(calls) == 1:
            await books.entries.publish(domain, 12, live, b"", b"".join(passing))
        return answer

    monkeypatch.setattr(books.entries, "_sweep_some", sweep_and_churn)
    assert await books.entries.sweep_shard(domain, 5, pack_number(11)) == len(leaving)
    assert calls[:3] == [0, 256, 0]
    assert await books.entries.size() == Size()


@pytest.mark.parametrize("number", [0, 0x0A0D, NUMBERS - 1])
async def test_any_holder_number(books: Books, number: int) -> None:
    domain, pages = DOMAINS[1], fingerprints(500, seed=4)
    live = pack_number(number) + pack_number(7)
    assert await books.entries.publish(domain, 7, live, b"".join(pages[:300]), b"") == 0
    assert await books.entries.publish(domain, number, live, b"".join(pages), b"") == 300
    assert await sizes(books) == (800, 500)
    assert await books.entries.publish(domain, number, live, b"", b"".join(pages)) == 0
    assert await sizes(books) == (300, 300)


async def test_hash_tags_spread_a_domain_over_a_cluster(server: Server, books: Books) -> None:
    publisher = books.index.publisher()
    await publisher.announce("alpha", 1, "")
    await publisher.publish(DOMAINS[0], b"".join(fingerprints(2_000, seed=5)), b"")
    shards = [key for key in server.all_keys() if DOMAINS[0].hex().encode() in key]
    assert len(shards) == 64
    assert len({key_slot(key) for key in shards}) > 60
    # These are changed together, so they must be on one node.
    assert len({key_slot(key) for key in server.all_keys() if b"{hosts}" in key}) == 1
