"""An arena that is frozen, and left to another host, with a merger by hand."""

from __future__ import annotations

import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.by_hand import Merger, Scanner

from samepage.daemon import wire
from samepage.daemon.wire import Outcome, Type

pytestmark = pytest.mark.needs("root", "away")

PAGES = 8
DATA = content(3, PAGES)
SNAPSHOT = bytes(range(16))
EBUSY = 16
MADV_DONTNEED, PROT_NONE, PROT_BOTH = 4, 0, 3
MREMAP_FIXED_MAYMOVE, MAP_FIXED_ANONYMOUS = 3, 0x32


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path)
    made.seal()
    yield made
    made.close()


@pytest.fixture
def application(merger: Merger, tmp_path: Path) -> Iterator[Application]:
    """With an arena `a`: six pages shared, and two absent."""
    with Application(tmp_path) as made:
        made.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        made.finish()
        made.call("fill", "a", 3)
        made.call("discard", "a", 6, 2)
        for page in range(6):
            merger.write_slot(1 + page, DATA[page * PAGE : (page + 1) * PAGE])
        assert merger.outcomes(Type.REPLACE, replace(0, 6, 1)) == [Outcome.MERGED] * 6
        yield made


def replace(page: int, count: int, slot: int) -> bytes:
    return wire.REPLACE.pack(1, 0) + struct.pack("<QQQ", page, count, slot)


def freeze(merger: Merger, milliseconds: int) -> None:
    assert merger.ask(Type.FREEZE, milliseconds.to_bytes(4, "little")) == 0


def told_of_leaving(merger: Merger) -> int:
    """Return the error in the answer to LEAVE, whatever else the agent tells of first."""
    while (message := wire.parse(merger.agent.recv(wire.MESSAGE_MAX))).type is not Type.DONE:
        assert message.type in (Type.RESTORED, Type.SEALED, Type.STALLS)
    return wire.unpack_outcomes(message)[0]


def waits(application: Application) -> bool:
    """Whether what was begun goes on, for a moment at least."""
    assert application.process.stdout is not None
    return not select.select([application.process.stdout], [], [], 0.3)[0]


@pytest.mark.parametrize(("page", "bytes_before"), [(2, DATA[2 * PAGE]), (7, 0)])
def test_writes_wait_until_the_thaw(
    merger: Merger, application: Application, page: int, bytes_before: int
) -> None:
    freeze(merger, 60_000)
    assert application.call("read", "a", PAGE, 1) == DATA[PAGE : PAGE + 1].hex()
    application.start("write", "a", page * PAGE + 1, "aa")
    assert waits(application)
    freeze(merger, 0)
    application.finish()
    if page == 2:
        notice = wire.unpack_records(wire.RANGE, merger.receive(Type.RESTORED))
        assert notice.tolist() == [(2, 1)]
    assert application.call("read", "a", page * PAGE, 2) == bytes([bytes_before, 0xAA]).hex()
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY


def test_the_freeze_ends_in_time(merger: Merger, application: Application) -> None:
    freeze(merger, 50)
    application.call("write", "a", 0, "01")
    merger.receive(Type.RESTORED)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY
    assert application.call("read", "a", 0, 1) == "01"


def test_private_pages_cannot_be_written_while_it_is_frozen(
    merger: Merger, application: Application
) -> None:
    application.call("write", "a", 6 * PAGE, "77" * PAGE)
    freeze(merger, 60_000)
    assert application.call("read", "a", 6 * PAGE, 1) == "77"
    application.start("write", "a", 6 * PAGE, "78")
    assert waits(application)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY
    assert merger.outcomes(Type.READ, wire.PAGE_RANGE.pack(6, 1)) == [Outcome.MERGED]
    assert merger.read_window(0, PAGE) == b"\x77" * PAGE
    merger.write_slot(7, b"\x77" * PAGE)
    outcomes = merger.outcomes(Type.REPLACE, replace(6, 2, 7))
    assert outcomes == [Outcome.MERGED, Outcome.ABSENT]
    assert waits(application)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == 0
    with pytest.raises(ApplicationError, match=r"it ended with -7"):
        application.finish()


def test_a_page_that_is_refused_stays_frozen(merger: Merger, application: Application) -> None:
    application.call("write", "a", 6 * PAGE, "77")
    freeze(merger, 60_000)
    freeze(merger, 50_000)  # for longer, or less long
    assert merger.outcomes(Type.REPLACE, replace(6, 1, 1)) == [Outcome.DIFFERS]
    application.start("write", "a", 6 * PAGE, "78")
    assert waits(application)
    assert merger.outcomes(Type.READ, wire.PAGE_RANGE.pack(6, 1)) == [Outcome.MERGED]
    assert merger.read_window(0, 1) == b"\x77"
    freeze(merger, 0)
    application.finish()
    assert application.call("read", "a", 6 * PAGE, 2) == "7800"


def test_restored_pages_are_frozen(merger: Merger, application: Application) -> None:
    freeze(merger, 60_000)
    merger.order(Type.RESTORE, wire.PAGE_RANGE.pack(1, 2))
    merger.receive(Type.RESTORED)
    assert wire.unpack_outcomes(merger.receive(Type.DONE))[0] == 0
    application.start("write", "a", 2 * PAGE, "01")
    assert waits(application)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY
    freeze(merger, 0)
    application.finish()
    assert application.call("read", "a", PAGE, PAGE) == DATA[PAGE : 2 * PAGE].hex()


def test_nothing_goes_away_while_it_is_frozen(merger: Merger, application: Application) -> None:
    freeze(merger, 60_000)
    assert merger.make_away(6, 2) == [Outcome.BUSY] * 2
    assert merger.evict(DATA, (0, 2)) == [Outcome.BUSY] * 2
    freeze(merger, 0)
    assert merger.make_away(6, 2) == [Outcome.MERGED] * 2


def test_pages_beside_away_ones_are_frozen(merger: Merger, application: Application) -> None:
    assert merger.evict(DATA, (0, 3)) == [Outcome.MERGED] * 3
    assert merger.fill(DATA, (1, 1)) == [Outcome.MERGED]
    freeze(merger, 60_000)
    application.start("write", "a", PAGE, "01")
    assert waits(application)
    assert merger.outcomes(Type.READ, wire.PAGE_RANGE.pack(1, 1)) == [Outcome.MERGED]
    assert merger.read_window(0, PAGE) == DATA[PAGE : 2 * PAGE]
    freeze(merger, 0)
    application.finish()
    assert application.call("read", "a", PAGE, 1) == "01"


@pytest.mark.parametrize("page", [0, 5], ids=["shared", "private"])
@pytest.mark.parametrize("call", ["madvise", "mremap"])
def test_discarding_and_moving_end_the_freeze(
    merger: Merger, application: Application, call: str, page: int
) -> None:
    application.call("write", "a", 5 * PAGE, "05")
    merger.receive(Type.RESTORED)
    address = application.call("reserve", 1)
    rest = {"madvise": [MADV_DONTNEED], "mremap": [PAGE, MREMAP_FIXED_MAYMOVE, address]}[call]
    freeze(merger, 60_000)
    application.call("system", call, "a", page, 1, *rest)
    application.call("write", "a", 6 * PAGE, "66")
    merger.order(Type.LEAVE, SNAPSHOT)
    assert told_of_leaving(merger) == EBUSY
    if call == "madvise":
        application.call("write", "a", page * PAGE + 1, "01")
        assert application.call("read", "a", page * PAGE, 2) == "0001"
    else:
        before = DATA[page * PAGE : (page + 1) * PAGE].hex()
        assert application.call("read_at", address + 2, PAGE - 2) == before[4:]
        application.call("write_at", address, "abcd")
        assert application.call("read_at", address, 2) == "abcd"


@pytest.mark.parametrize(
    ("call", "rest"), [("munmap", []), ("mprotect", [PROT_NONE])], ids=["munmap", "mprotect"]
)
def test_the_thaw_finds_other_mappings(
    merger: Merger, application: Application, call: str, rest: list[int]
) -> None:
    application.call("unshare", "a")
    merger.receive(Type.RESTORED)
    application.call("fill", "a", 3)
    freeze(merger, 60_000)
    application.call("system", call, "a", 3, 2, *rest)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY
    freeze(merger, 0)
    for page in (0, 1, 2, 5, 6, 7):
        application.call("write", "a", page * PAGE, "01")
    if call == "mprotect":
        application.call("system", "mprotect", "a", 3, 2, PROT_BOTH)
        application.call("write", "a", 3 * PAGE, "01")
        expected = bytes([1]) + DATA[3 * PAGE + 1 : 4 * PAGE]
        assert application.call("read", "a", 3 * PAGE, PAGE) == expected.hex()


def test_what_is_mapped_meanwhile_is_looked_at(merger: Merger, application: Application) -> None:
    application.call("fill", "a", 3, 6, 2)
    freeze(merger, 60_000)
    assert merger.outcomes(Type.REPLACE, replace(6, 2, 1)) == [Outcome.MERGED] * 2
    flags = (PROT_BOTH, MAP_FIXED_ANONYMOUS, 2**64 - 1, 0)
    application.call("system", "mmap", "a", 6, 2, *flags)
    application.call("write", "a", 6 * PAGE, "01")
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY
    freeze(merger, 0)
    assert application.call("read", "a", 6 * PAGE, 2) == "0100"


@pytest.mark.needs("tracking")
def test_all_that_is_private_counts_as_written_after_the_thaw(
    merger: Merger, application: Application, tmp_path: Path
) -> None:
    application.call("write", "a", 6 * PAGE, "66")
    scanner = Scanner(tmp_path)
    try:
        scanner.seal()
        scanner.welcome()
        scanner.open_arena()
        assert scanner.changed(0, PAGES) == [(6, 1)]
        assert scanner.changed(0, PAGES) == []
        freeze(merger, 60_000)
        assert scanner.changed(0, PAGES) == [(6, 1)]  # it is not followed
        freeze(merger, 0)
        assert scanner.changed(0, PAGES) == [(6, 1)]
        assert scanner.changed(0, PAGES) == []
        application.call("write", "a", 6 * PAGE, "67")
        assert scanner.changed(0, PAGES) == [(6, 1)]
    finally:
        scanner.close()


def test_disconnecting_ends_the_freeze(merger: Merger, application: Application) -> None:
    application.call("write", "a", 6 * PAGE, "66")
    freeze(merger, 60_000)
    application.call("disconnect")
    application.call("write", "a", 6 * PAGE + 1, "67")
    application.call("write", "a", 0, "01")
    assert application.call("read", "a", 6 * PAGE, 2) == "6667"


@pytest.mark.parametrize("call", ["unshare", "discard", "seal"])
def test_what_the_application_asks_for_ends_the_freeze(
    merger: Merger, application: Application, call: str
) -> None:
    freeze(merger, 60_000)
    application.call(call, "a", *([0, 1] if call == "discard" else []))
    merger.order(Type.LEAVE, SNAPSHOT)
    assert told_of_leaving(merger) == EBUSY


def test_a_broken_connection_ends_the_freeze(merger: Merger, application: Application) -> None:
    freeze(merger, 60_000)
    merger.agent.close()
    merger.welcome()
    merger.announced()
    application.call("write", "a", 0, "01")
    assert application.call("read", "a", 0, 1) == "01"


def test_an_arena_that_was_left_is_an_error(
    merger: Merger, application: Application, tmp_path: Path
) -> None:
    scanner = Scanner(tmp_path)
    try:
        scanner.seal()
        scanner.welcome()
        scanner.open_arena()
        freeze(merger, 60_000)
        assert merger.ask(Type.LEAVE, SNAPSHOT) == 0
        scanner.receive(Type.ARENA_CLOSE)
        assert merger.ask(Type.LEAVE, SNAPSHOT) == 0  # asked again
        assert merger.ask(Type.LEAVE, bytes(15) + b"\1") == EBUSY
        assert merger.ask(Type.READ, wire.PAGE_RANGE.pack(0, 1)) == 2  # ENOENT
        for call in ("stats", "share", "unshare", "fetch"):
            with pytest.raises(ApplicationError, match="MigratedError"):
                application.call(call, "a")
        merger.agent.close()
        merger.welcome()
        wanted = merger.announced()
        assert (wanted.extents, wanted.away, wanted.left) == (0, 0, SNAPSHOT)
        assert merger.ask(Type.LEAVE, SNAPSHOT) == 0
        with pytest.raises(ApplicationError, match=r"it ended with -7"):
            application.call("read", "a", 0, 1)
    finally:
        scanner.close()


def test_an_arena_that_was_left_is_closed(merger: Merger, application: Application) -> None:
    freeze(merger, 60_000)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == 0
    application.call("close", "a")
    merger.receive(Type.ARENA_CLOSE)


def test_bad_orders_end_the_connection(merger: Merger, application: Application) -> None:
    bad = {
        "short freeze": (Type.FREEZE, bytes(3)),
        "long freeze": (Type.FREEZE, bytes(8)),
        "short leave": (Type.LEAVE, bytes(15)),
        "leave without a snapshot": (Type.LEAVE, bytes(16)),
    }
    for name, (kind, payload) in bad.items():
        merger.order(kind, payload)
        assert merger.agent.recv(wire.MESSAGE_MAX) == b"", name
        merger.welcome()
        merger.announced()
    assert application.call("read", "a", 0, 6 * PAGE) == DATA[: 6 * PAGE].hex()
