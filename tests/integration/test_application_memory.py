"""What an application does to an arena's mappings: bytes, books and mappings stay right."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.up import Up, running
from helpers.waiting import until

from samepage import host

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PRIVATE, SHARED, ABSENT = 4, 5, 0
PAGES = 600
ZEROS = "00" * PAGE
MADV_DONTNEED, PROT_NONE, PROT_READ, PROT_BOTH = 4, 0, 1, 3
MREMAP_FIXED_MAYMOVE, MAP_FIXED_ANONYMOUS = 3, 0x32


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster")) as up:
        yield up


@pytest.fixture
def pair(cluster: Up) -> Iterator[tuple[Application, Application]]:
    """Two applications with an arena `a` or `b` each, merged."""
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application, name in ((one, "a"), (two, "b")):
            application.call("create", name, PAGES)
            application.call("fill", name, 1)
        assert two.call("share", "b")["shared"] == PAGES
        yield one, two


def page_of(seed: int, page: int) -> str:
    return content(seed, PAGES)[page * PAGE : (page + 1) * PAGE].hex()


def shared_pages(cluster: Up, name: str) -> int:
    """By the merger's books."""
    arenas = host.list_arenas(str(cluster.host()))
    return next(arena.shared_pages for arena in arenas if arena.name == name)


async def books_agree(cluster: Up, application: Application, name: str) -> None:
    """The merger's books count what the kernel shows, at the latest soon."""
    mapped = sum(pages for _, pages, inode, _ in application.call("mappings", name) if inode)
    await until(lambda: shared_pages(cluster, name) == mapped)


def test_runs_of_neighbours_are_one_mapping(pair: tuple[Application, Application]) -> None:
    for application, name in zip(pair, "ab", strict=True):
        # three takes, one run
        [(page, pages, inode, _)] = application.call("mappings", name)
        assert (page, pages, inode > 0) == (0, PAGES, True)


@pytest.mark.needs("tracking")
def test_unsharing_leaves_as_many_mappings_as_before(cluster: Up) -> None:
    with Application(cluster.host()) as one:
        for name in ("a", "b"):
            one.call("create", name, PAGES)
            one.call("fill", name, 1)
        one.call("write", "b", 100 * PAGE, "01")
        one.call("write", "b", 300 * PAGE, "01")
        before = one.call("mapping_count")
        one.call("share", "a")
        assert len(one.call("mappings", "b")) == 5
        for name in ("a", "b"):
            one.call("unshare", name)
            assert [pages for _, pages, _, _ in one.call("mappings", name)] == [PAGES]
        assert one.call("mapping_count") == before


@pytest.mark.needs("tracking")
def test_pages_written_in_any_order_become_one_mapping(
    pair: tuple[Application, Application],
) -> None:
    one, _ = pair
    pages = list(range(PAGES))
    random.Random(4).shuffle(pages)
    for page in pages:
        one.call("write", "a", page * PAGE + 5, "ff")
    assert [pages for _, pages, _, _ in one.call("mappings", "a")] == [PAGES]
    expected = bytearray(content(1, PAGES))
    expected[5::PAGE] = b"\xff" * PAGES
    assert one.call("read", "a", 0, PAGES * PAGE) == expected.hex()


@pytest.mark.needs("discard")
async def test_discarded_shared_pages_are_zero(
    cluster: Up, pair: tuple[Application, Application]
) -> None:
    one, two = pair
    one.call("system", "madvise", "a", 10, 20, MADV_DONTNEED)
    assert one.call("read", "a", 10 * PAGE, 20 * PAGE) == ZEROS * 20
    one.call("system", "madvise", "a", 100, 2, MADV_DONTNEED)
    one.call("write", "a", 100 * PAGE + 1, "07")
    assert one.call("read", "a", 100 * PAGE, 3) == "000700"
    assert one.call("read", "a", 102 * PAGE, PAGE) == page_of(1, 102)
    assert two.call("read", "b", 10 * PAGE, PAGE) == page_of(1, 10)
    await books_agree(cluster, one, "a")
    assert shared_pages(cluster, "a") == PAGES - 22


@pytest.mark.needs("discard")
def test_discarding_while_merging(cluster: Up) -> None:
    with Application(cluster.host()) as one:
        for name in ("a", "b"):
            one.call("create", name, 64)
            one.call("fill", name, 3)
        assert one.call("discard_in_turn", "a", 3, 60) == []
        assert one.call("digest", "a") == one.call("digest", "b")


async def test_discard_of_any_pages(cluster: Up, pair: tuple[Application, Application]) -> None:
    one, _ = pair
    one.call("fill", "a", 2, 50, 100)
    one.call("discard", "a", 20, 200)
    assert one.call("pagemap", "a")[20:220] == [ABSENT] * 200
    assert one.call("read", "a", 20 * PAGE, 200 * PAGE) == ZEROS * 200
    assert one.call("read", "a", 19 * PAGE, PAGE) == page_of(1, 19)
    assert one.call("read", "a", 220 * PAGE, PAGE) == page_of(1, 220)
    one.call("discard", "a", 0, 0)
    await books_agree(cluster, one, "a")
    assert one.call("share", "a")["shared"] == PAGES - 200
    with pytest.raises(ApplicationError, match="InvalidArgumentError"):
        one.call("discard", "a", PAGES - 1, 2)


async def test_pages_moved_away_keep_their_bytes(
    cluster: Up, pair: tuple[Application, Application]
) -> None:
    one, two = pair
    address = one.call("reserve", 8)
    one.call("system", "mremap", "a", 40, 8, 8 * PAGE, MREMAP_FIXED_MAYMOVE, address)
    # until the books agree, nothing may be freed; afterwards nothing may be missed
    await books_agree(cluster, one, "a")
    assert shared_pages(cluster, "a") == PAGES - 8
    two.call("close", "b")
    one.call("create", "other", 100)
    one.call("fill", "other", 6)
    one.call("share", "other")
    assert one.call("read_at", address, PAGE) == page_of(1, 40)
    assert one.call("read_at", address + 7 * PAGE, PAGE) == page_of(1, 47)
    assert one.call("read", "a", 48 * PAGE, PAGE) == page_of(1, 48)


async def test_pages_that_are_unmapped_leave_the_books(
    cluster: Up, pair: tuple[Application, Application]
) -> None:
    one, two = pair
    one.call("system", "munmap", "a", 30, 10)
    await books_agree(cluster, one, "a")
    assert shared_pages(cluster, "a") == PAGES - 10
    # a hole in the arena is no reason to fail, and what is mapped there is left alone
    two.call("share", "b")
    one.call("system", "mmap", "a", 30, 2, PROT_BOTH, MAP_FIXED_ANONYMOUS, 2**64 - 1, 0)
    one.call("write", "a", 30 * PAGE, "1234")
    one.call("share", "a")
    one.call("unshare", "a")
    assert one.call("read", "a", 30 * PAGE, 3) == "123400"
    assert one.call("read", "a", 40 * PAGE, PAGE) == page_of(1, 40)


def test_protected_pages_stay_protected(pair: tuple[Application, Application]) -> None:
    one, two = pair
    one.call("system", "mprotect", "a", 10, 5, PROT_READ)
    one.call("system", "mprotect", "a", 20, 5, PROT_NONE)
    two.call("share", "b")
    one.call("share", "a")
    one.call("unshare", "a")
    assert one.call("protections", "a", 10, 5) == ["r--p"]
    assert one.call("protections", "a", 20, 5) == ["---p"]
    one.call("system", "mprotect", "a", 10, 15, PROT_BOTH)
    assert one.call("read", "a", 0, PAGES * PAGE) == content(1, PAGES).hex()
    one.call("write", "a", 22 * PAGE, "ab")
    assert one.call("share", "a")["shared"] == PAGES - 1
