"""Leases, epochs and what is left of hosts that are gone, on a real Valkey and a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from helpers.index_harness import Books, eventually

from samepage.errors import InvalidArgumentError, ServiceUnavailableError
from samepage_index.errors import ForgottenError, NameTakenError
from samepage_index.janitor import Janitor

from .conftest import Server

DOMAIN = b"d" * 16
PAGES = [bytes([number]) * 16 for number in range(100)]
PACKED = b"".join(PAGES)


@pytest.fixture
async def short(server: Server, books: Books) -> AsyncIterator[Books]:
    """The same index with leases of 50 ms."""
    async with Books(server.url, lease_ms=50) as made:
        yield made


def janitor(books: Books, keep_ms: int = 0) -> Janitor:
    return Janitor(books.hosts, books.entries, keep_ms, interval=0.01)


async def gone(books: Books, name: str) -> None:
    async def look() -> bool:
        return name not in [host.name for host in await books.index.hosts()]

    await eventually(look)


async def entries(books: Books) -> int:
    return (await books.entries.size()).entries


async def test_hosts_are_listed_with_what_they_announced(books: Books) -> None:
    for name, epoch in (("beta", 2**64 - 1), ("alpha", 1)):
        assert not await books.index.publisher().announce(name, epoch, f"{name}:7000")
    hosts = await books.index.hosts()
    assert [(h.name, h.epoch, h.merger_address) for h in hosts] == [
        ("alpha", 1, "alpha:7000"),
        ("beta", 2**64 - 1, "beta:7000"),
    ]
    assert len({host.number for host in hosts}) == 2
    assert all(59_000 < host.remaining_ms <= 60_000 for host in hosts)


async def test_an_epoch_resumes(books: Books) -> None:
    first = books.index.publisher()
    await first.announce("alpha", 7, "a:1")
    await first.publish(DOMAIN, PACKED, b"")
    second = books.index.publisher()
    assert await second.announce("alpha", 7, "a:2")
    assert [host.merger_address for host in await books.index.hosts()] == ["a:2"]
    assert await books.holders(DOMAIN, PAGES) == {page: {"alpha"} for page in PAGES}
    assert await first.renew()


async def test_a_new_epoch_voids_the_old_ones_entries_at_once(books: Books) -> None:
    old, new, other = (books.index.publisher() for _ in range(3))
    await old.announce("alpha", 7, "")
    await old.publish(DOMAIN, PACKED, b"")
    assert not await new.announce("alpha", 8, "")
    assert await books.holders(DOMAIN, PAGES) == {}
    assert not await old.renew()
    with pytest.raises(ForgottenError, match="announce again"):
        await old.publish(DOMAIN, PACKED, b"")
    await other.announce("beta", 1, "")
    assert await other.publish(DOMAIN, PACKED, b"") == 0
    assert await new.publish(DOMAIN, PACKED[:160], b"") == 10
    assert await janitor(books).run_once() == 100
    assert await entries(books) == 110


async def test_a_second_host_of_the_name_is_refused(books: Books) -> None:
    first, second = books.index.publisher(), books.index.publisher()
    await first.announce("alpha", 7, "a:1")
    await first.publish(DOMAIN, PACKED, b"")
    with pytest.raises(NameTakenError, match=r"'alpha', with its merger at a:1: give each host a"):
        await second.announce("alpha", 8, "b:1")
    assert await first.renew()
    assert await books.holders(DOMAIN, PAGES) == {page: {"alpha"} for page in PAGES}
    # Started anew where it was.
    assert not await books.index.publisher().announce("alpha", 9, "a:1")
    with pytest.raises(NameTakenError):
        await second.announce("alpha", 8, "b:1")


async def test_a_host_that_moved_comes_back_when_its_lease_ends(books: Books, short: Books) -> None:
    await short.index.publisher().announce("alpha", 7, "a:1")
    await gone(books, "alpha")
    assert not await books.index.publisher().announce("alpha", 8, "b:1")
    assert [host.merger_address for host in await books.index.hosts()] == ["b:1"]


async def test_a_host_that_took_its_leave_comes_back_anywhere(books: Books) -> None:
    old, new = books.index.publisher(), books.index.publisher()
    await old.announce("alpha", 7, "a:1")
    await old.publish(DOMAIN, PACKED, b"")
    await old.leave()
    assert set(await books.holders(DOMAIN, PAGES)) == set(PAGES), "its memory is there still"
    assert not await new.announce("alpha", 8, "b:1")
    await old.leave()
    with pytest.raises(NameTakenError):
        await books.index.publisher().announce("alpha", 9, "c:1")


@pytest.mark.parametrize("address", ["", "localhost:7001"])
async def test_two_hosts_that_call_their_address_the_same(books: Books, address: str) -> None:
    """The second looks like the first started anew, but then the first is still there."""
    first, second = books.index.publisher(), books.index.publisher()
    await first.announce("alpha", 7, address)
    await second.announce("alpha", 8, address)
    with pytest.raises(NameTakenError):
        await first.announce("alpha", 7, address)
    await second.leave()
    assert not await first.announce("alpha", 7, address)


async def test_an_ended_lease_hides_the_host(books: Books, short: Books) -> None:
    publisher, other = short.index.publisher(), books.index.publisher()
    await other.announce("beta", 1, "")
    await publisher.announce("alpha", 1, "")
    await publisher.publish(DOMAIN, PACKED, b"")
    await gone(books, "alpha")
    assert await books.holders(DOMAIN, PAGES) == {}
    assert await other.publish(DOMAIN, PACKED, b"") == 0
    assert (await books.index.stats())[1] == 1
    # Not swept yet: it only has to say that it is alive.
    assert await janitor(books, keep_ms=60_000).run_once() == 0
    assert await publisher.renew()
    assert set(await books.holders(DOMAIN, PAGES)) == set(PAGES)


async def test_a_host_without_a_lease_is_swept(books: Books, short: Books) -> None:
    publisher, other = short.index.publisher(), books.index.publisher()
    await other.announce("beta", 1, "")
    await other.publish(DOMAIN, PACKED[:320], b"")
    await publisher.announce("alpha", 1, "")
    await publisher.publish(DOMAIN, PACKED, b"")
    await gone(books, "alpha")
    assert await entries(books) == 120
    assert await janitor(books).run_once() == 100
    assert await entries(books) == 20
    assert await janitor(books).run_once() == 0
    assert not await publisher.renew()
    assert not await publisher.announce("alpha", 1, "")


async def test_sweeping_frees_numbers_and_domains(
    server: Server, books: Books, short: Books
) -> None:
    publisher = short.index.publisher()
    await publisher.announce("alpha", 1, "")
    await publisher.publish(DOMAIN, PACKED, b"")
    assert await books.entries.domains() == [DOMAIN]
    await gone(books, "alpha")
    await janitor(books).run_once()
    assert await books.entries.domains() == []
    left = [key for key in server.all_keys() if not key.startswith(b"samepage:mark:")]
    assert left == [b"samepage:{hosts}:turn"]


async def test_one_janitor_at_a_time(books: Books, short: Books) -> None:
    publisher = short.index.publisher()
    await publisher.announce("alpha", 1, "")
    await publisher.publish(DOMAIN, PACKED, b"")
    await gone(books, "alpha")
    first, second = janitor(books), janitor(books)
    assert await first._has_turn()
    assert await second.run_once() == 0
    assert await first.run_once() == 100


async def test_flushed(server: Server, books: Books) -> None:
    publisher, other = books.index.publisher(), books.index.publisher()
    await publisher.announce("alpha", 1, "")
    await publisher.publish(DOMAIN, PACKED, b"")
    server.flush()
    assert not await publisher.renew()
    with pytest.raises(ForgottenError):
        await publisher.publish(DOMAIN, PACKED, b"")
    await other.announce("beta", 1, "")
    assert await books.holders(DOMAIN, PAGES) == {}
    assert not await publisher.announce("alpha", 1, "")
    assert await publisher.publish(DOMAIN, PACKED, b"") == 0
    assert await books.holders(DOMAIN, PAGES) == {page: {"alpha"} for page in PAGES}


async def test_scripts_flushed(server: Server, books: Books) -> None:
    publisher = books.index.publisher()
    await publisher.announce("alpha", 1, "")
    server.flush_scripts()
    assert await publisher.publish(DOMAIN, PACKED, b"") == 0
    assert await entries(books) == 100


async def test_indexes_with_other_prefixes_do_not_meet(server: Server, books: Books) -> None:
    async with Books(server.url, prefix="other") as others:
        publisher = others.index.publisher()
        await publisher.announce("alpha", 1, "")
        await publisher.publish(DOMAIN, PACKED, b"")
        assert await books.index.hosts() == []
        assert await entries(books) == 0
        assert await entries(others) == 100


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\n", "é", "x" * 254])
async def test_bad_host_names(books: Books, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="host name"):
        await books.index.publisher().announce(name, 1, "")
    assert await books.index.hosts() == []


async def test_all_numbers_in_use(books: Books) -> None:

    fill = """for block = 0, 15 do
        local fields = {}
        for i = 0, 4095 do
            local number = block * 4096 + i
            fields[#fields + 1] = string.char(number % 256, math.floor(number / 256))
            fields[#fields + 1] = '0'
            if #fields == 4096 then redis.call('HSET', KEYS[1], unpack(fields)) fields = {} end
        end
        if #fields > 0 then redis.call('HSET', KEYS[1], unpack(fields)) end
    end"""
    await books.store.run([("EVAL", fill, 1, "samepage:{hosts}:numbers")])
    with pytest.raises(ServiceUnavailableError, match="all 65536 host numbers are in use"):
        await books.index.publisher().announce("alpha", 1, "")
    await books.hosts.release(b"\x34\x12")
    await books.index.publisher().announce("alpha", 1, "")
    assert [host.number for host in await books.index.hosts()] == [0x1234]
