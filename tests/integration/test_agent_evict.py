"""Pages that leave the host on order: only those that are equal to what others hold."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.by_hand import Merger, Scanner, digest_of

from samepage.daemon import wire
from samepage.daemon.wire import Outcome, PageState, Type

pytestmark = pytest.mark.needs("root", "away")

PAGES = 600
DATA = content(5, PAGES)
ABSENT, PRIVATE, SHARED = 0, 4, 5
MERGED = Outcome.MERGED


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path)
    made.seal()
    yield made
    made.close()


@pytest.fixture
def application(merger: Merger, tmp_path: Path) -> Iterator[Application]:
    """With an arena `a`, all of it private."""
    with Application(tmp_path) as made:
        made.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        made.finish()
        made.call("fill", "a", 5)
        yield made


def read_back(merger: Merger, application: Application) -> str:
    """All bytes, brought back as they are touched."""
    application.start("fetch", "a")
    left = {page for page, count in merger.wanted() for page in range(page, page + count)}
    for page in sorted(left):
        assert merger.fill(DATA, (page, 1)) == [MERGED]
    application.finish()
    data: str = application.call("read", "a", 0, PAGES * PAGE)
    return data


def test_private_pages_go_and_come_back(merger: Merger, application: Application) -> None:
    assert merger.evict(DATA, (0, 100), (200, 300)) == [MERGED] * 400
    assert merger.evict(DATA, (99, 2)) == [Outcome.ABSENT, MERGED]
    assert application.call("pagemap", "a")[98:102] == [ABSENT] * 3 + [PRIVATE]
    assert [pages for _, pages, _, _ in application.call("mappings", "a")] == [101, 99, 300, 100]
    assert read_back(merger, application) == DATA.hex()


def test_what_was_written_stays(merger: Merger, application: Application) -> None:
    application.call("write", "a", 7 * PAGE, "abcdef")
    outcomes = merger.evict(DATA, (5, 5))
    assert outcomes == [MERGED, MERGED, Outcome.DIFFERS, MERGED, MERGED]
    expected = bytearray(DATA)
    expected[7 * PAGE : 7 * PAGE + 3] = b"\xab\xcd\xef"
    assert read_back(merger, application) == expected.hex()


def test_absent_pages_are_told(merger: Merger, application: Application) -> None:
    application.call("discard", "a", 3, 1)
    assert merger.evict(DATA, (2, 3)) == [MERGED, Outcome.ABSENT, MERGED]
    assert application.call("read", "a", 3 * PAGE, PAGE) == bytes(PAGE).hex()


def test_shared_pages_go_without_a_notice(merger: Merger, application: Application) -> None:
    for slot in range(1, 6):
        merger.write_slot(slot, DATA[(9 + slot) * PAGE : (10 + slot) * PAGE])
    order = wire.REPLACE.pack(1, 0) + struct.pack("<QQQ", 10, 5, 1)
    assert merger.outcomes(Type.REPLACE, order) == [MERGED] * 5
    other = DATA[: 12 * PAGE] + bytes(PAGE) + DATA[13 * PAGE :]
    outcomes = merger.evict(other, (9, 7))
    assert outcomes == [MERGED] * 3 + [Outcome.DIFFERS] + [MERGED] * 3
    assert application.call("pagemap", "a")[8:17] == (
        [PRIVATE] + [ABSENT] * 3 + [SHARED] + [ABSENT] * 3 + [PRIVATE]
    )
    assert read_back(merger, application) == DATA.hex()
    application.call("write", "a", 12 * PAGE, DATA[12 * PAGE : 12 * PAGE + 1].hex())
    assert wire.unpack_records(wire.RANGE, merger.receive(Type.RESTORED)).tolist() == [(12, 1)]


def test_filled_pages_go_again(merger: Merger, application: Application) -> None:
    assert merger.evict(DATA, (100, 50)) == [MERGED] * 50
    assert merger.fill(DATA, (110, 5), (120, 1)) == [MERGED] * 6
    application.call("write", "a", 111 * PAGE, "00000000")
    assert merger.evict(DATA, (110, 12)) == (
        [MERGED, Outcome.DIFFERS, *[MERGED] * 3, *[Outcome.ABSENT] * 5, MERGED, Outcome.ABSENT]
    )
    expected = bytearray(DATA)
    expected[111 * PAGE : 111 * PAGE + 4] = bytes(4)
    assert read_back(merger, application) == expected.hex()


def test_sealed_pages_go(merger: Merger, application: Application) -> None:
    merger.write_slot(1, DATA[:PAGE])
    order = wire.REPLACE.pack(1, 0) + struct.pack("<QQQ", 0, 1, 1)
    assert merger.outcomes(Type.REPLACE, order) == [MERGED]
    application.call("seal", "a")
    assert merger.evict(DATA, (0, 10)) == [MERGED] * 10
    assert set(application.call("protections", "a", 0, PAGES)) == {"r--p"}
    assert merger.outcomes(Type.REPLACE, order) == [MERGED]
    assert read_back(merger, application) == DATA.hex()
    assert application.call("pagemap", "a")[:11] == [SHARED] + [PRIVATE] * 10


def test_protected_pages_stay_protected(merger: Merger, application: Application) -> None:
    application.call("system", "mprotect", "a", 10, 5, 1)  # PROT_READ
    outcomes = merger.evict(DATA, (9, 7))
    assert outcomes == [MERGED] + [Outcome.UNSUPPORTED] * 5 + [MERGED]
    assert application.call("protections", "a", 10, 5) == ["r--p"]
    assert read_back(merger, application) == DATA.hex()


def test_evicted_pages_that_are_lost(merger: Merger, application: Application) -> None:
    merger.evict(DATA, (10, 1))
    assert merger.outcomes(Type.POISON, wire.PAGE_RANGE.pack(10, 1)) == [MERGED]
    assert merger.evict(DATA, (10, 1)) == [Outcome.ABSENT]
    with pytest.raises(ApplicationError, match="LostError"):
        application.call("fetch_read", "a", 10 * PAGE, 1)
    with pytest.raises(ApplicationError, match="LostError"):
        application.call("unshare", "a")
    with pytest.raises(ApplicationError, match=r"it ended with -7"):
        application.call("write", "a", 10 * PAGE, "00")


def test_the_scanner_is_told_that_they_are_absent(
    merger: Merger, application: Application, tmp_path: Path
) -> None:
    scanner = Scanner(tmp_path)
    try:
        scanner.seal()
        scanner.welcome()
        scanner.open_arena()
        merger.evict(DATA, (1, 2))
        merger.outcomes(Type.POISON, wire.PAGE_RANGE.pack(2, 1))
        expected = [PageState.PRIVATE, PageState.ABSENT, PageState.ABSENT, PageState.PRIVATE]
        assert scanner.fingerprint((0, 4))[1] == expected
    finally:
        scanner.close()


BAD = {
    "nothing": b"",
    "no digest": wire.PAGE_RANGE.pack(0, 1),
    "too few digests": wire.PAGE_RANGE.pack(0, 2) + digest_of(0),
    "too many digests": wire.PAGE_RANGE.pack(0, 1) + digest_of(0) * 2,
    "beyond the arena": wire.PAGE_RANGE.pack(PAGES - 1, 2) + digest_of(0) * 2,
    "more than the window holds": wire.PAGE_RANGE.pack(0, 513) + digest_of(0) * 513,
    "backwards": wire.PAGE_RANGE.pack(5, 1) + wire.PAGE_RANGE.pack(3, 1) + digest_of(0) * 2,
    "a count that wraps": wire.PAGE_RANGE.pack(0, 2**59 + 1) + digest_of(0),
}


def test_bad_orders_end_the_connection(merger: Merger, application: Application) -> None:
    for name, payload in BAD.items():
        merger.order(Type.EVICT, payload)
        assert merger.agent.recv(wire.MESSAGE_MAX) == b"", name
        merger.welcome()
        merger.announced()
    assert application.call("read", "a", 0, PAGES * PAGE) == DATA.hex()
