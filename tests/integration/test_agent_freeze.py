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


def test_private_pages_become_shared_while_it_is_frozen(
    merger: Merger, application: Application
) -> None:
    application.call("write", "a", 6 * PAGE, "77" * PAGE)
    freeze(merger, 60_000)
    application.call("write", "a", 6 * PAGE, "78")  # private still
    assert merger.ask(Type.LEAVE, SNAPSHOT) == EBUSY
    merger.write_slot(7, b"\x78" + b"\x77" * (PAGE - 1))
    outcomes = merger.outcomes(Type.REPLACE, replace(6, 2, 7))
    assert outcomes == [Outcome.MERGED, Outcome.ABSENT]
    application.start("write", "a", 7 * PAGE, "01")  # was absent, and looked at by REPLACE
    assert waits(application)
    assert merger.ask(Type.LEAVE, SNAPSHOT) == 0
    with pytest.raises(ApplicationError, match=r"it ended with -7"):
        application.finish()


@pytest.mark.parametrize("call", ["unshare", "discard", "seal"])
def test_what_the_application_asks_for_ends_the_freeze(
    merger: Merger, application: Application, call: str
) -> None:
    freeze(merger, 60_000)
    application.call(call, "a", *([0, 1] if call == "discard" else []))
    merger.order(Type.LEAVE, SNAPSHOT)
    while (message := wire.parse(merger.agent.recv(wire.MESSAGE_MAX))).type is not Type.DONE:
        assert message.type in (Type.RESTORED, Type.STALLS)
    assert wire.unpack_outcomes(message)[0] == EBUSY


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
