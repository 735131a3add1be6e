"""What an agent tells: written pages, fingerprints of any ranges, and how long threads waited."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from application import PAGE, Application, content
from helpers.by_hand import Merger, Scanner

from samepage.daemon import wire
from samepage.daemon.wire import PageState, Type

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PAGES = 64


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path)
    made.seal()
    yield made
    made.close()


@pytest.fixture
def scanner(tmp_path: Path) -> Iterator[Scanner]:
    made = Scanner(tmp_path)
    made.seal()
    yield made
    made.close()


def connect(merger: Merger, scanner: Scanner, application: Application) -> None:
    """Give the application an arena, which both daemons know."""
    application.start("create", "a", PAGES)
    merger.welcome()
    scanner.welcome()
    merger.open_arena()
    scanner.open_arena()
    application.finish()


def test_fingerprints_of_several_ranges(merger: Merger, scanner: Scanner, tmp_path: Path) -> None:
    with Application(tmp_path) as application:
        connect(merger, scanner, application)
        application.call("fill", "a", 1, 0, 10)
        application.call("write", "a", 40 * PAGE, "00")
        prints, states = scanner.fingerprint((2, 1), (8, 3), (40, 1))
        data = content(1, 10)
        looked = [data[page * PAGE : (page + 1) * PAGE] for page in (2, 8, 9)]
        expected = [xxhash.xxh3_128_digest(page, 7) for page in looked]
        zero = xxhash.xxh3_128_digest(bytes(PAGE), 7)
        assert [row.tobytes() for row in prints] == [*expected, bytes(16), zero]
        private, absent = PageState.PRIVATE, PageState.ABSENT
        assert states == [private, private, private, absent, PageState.ZERO]


def test_what_cannot_be_read_is_absent(merger: Merger, scanner: Scanner, tmp_path: Path) -> None:
    with Application(tmp_path) as application:
        connect(merger, scanner, application)
        application.call("fill", "a", 1)
        application.call("system", "mprotect", "a", 3, 2, 0)  # PROT_NONE
        application.call("system", "munmap", "a", 7, 1)
        _, states = scanner.fingerprint((0, 10))
        there = [PageState.PRIVATE if page not in (3, 4, 7) else 0 for page in range(10)]
        assert states == there


@pytest.mark.needs("tracking")
def test_written_pages_are_told_of_once(merger: Merger, scanner: Scanner, tmp_path: Path) -> None:
    with Application(tmp_path) as application:
        connect(merger, scanner, application)
        assert scanner.changed(0, PAGES) == []
        application.call("fill", "a", 1, 4, 8)
        assert scanner.changed(0, PAGES) == [(4, 8)]
        assert scanner.changed(0, PAGES) == []
        application.call("write", "a", 5 * PAGE, "00")
        application.call("write", "a", 9 * PAGE, "0102")
        application.call("discard", "a", 10, 1)
        assert scanner.changed(6, 10) == [(9, 1)]
        assert scanner.changed(0, PAGES) == [(5, 1)]


def test_writes_that_are_not_followed(merger: Merger, scanner: Scanner, tmp_path: Path) -> None:
    disabled = {"SAMEPAGE_DISABLE": "tracking"}
    with Application(tmp_path, env=disabled) as application:
        connect(merger, scanner, application)
        assert scanner.ask(Type.CHANGED, wire.PAGE_RANGE.pack(0, PAGES)) == 95  # ENOTSUP
        application.call("fill", "a", 1, 4, 8)
        assert scanner.fingerprint((4, 1))[1] == [PageState.PRIVATE]


BAD = {
    "changed beyond the arena": (Type.CHANGED, [(1, PAGES)]),
    "changed of nothing": (Type.CHANGED, [(0, 0)]),
    "changed with two ranges": (Type.CHANGED, [(0, 1), (2, 1)]),
    "fingerprint of nothing": (Type.FINGERPRINT, []),
    "fingerprint beyond the arena": (Type.FINGERPRINT, [(0, 1), (PAGES, 1)]),
    "fingerprint that wraps": (Type.FINGERPRINT, [(0, 1), (2**64 - 1, 2)]),
    "fingerprint of an empty range": (Type.FINGERPRINT, [(0, 1), (2, 0)]),
    "fingerprint backwards": (Type.FINGERPRINT, [(2, 1), (1, 1)]),
    "fingerprint twice": (Type.FINGERPRINT, [(2, 2), (3, 1)]),
}


def test_bad_orders_of_a_scanner_end_its_connection(
    merger: Merger, scanner: Scanner, tmp_path: Path
) -> None:
    with Application(tmp_path) as application:
        connect(merger, scanner, application)
        for kind, ranges in BAD.values():
            payload = b"".join(wire.PAGE_RANGE.pack(*pages) for pages in ranges)
            scanner.order(kind, payload)
            assert scanner.agent.recv(1) == b""
            scanner.welcome()
            scanner.open_arena()
        assert scanner.fingerprint((0, 1))[1] == [PageState.ABSENT]


def test_waits_are_told(merger: Merger, scanner: Scanner, tmp_path: Path) -> None:
    with Application(tmp_path) as application:
        connect(merger, scanner, application)
        application.call("write", "a", 0, "01" * PAGE)
        merger.write_slot(1, b"\1" * PAGE)
        merger.order(Type.REPLACE, wire.REPLACE.pack(1, 0) + struct.pack("<QQQ", 0, 1, 1))
        _, outcomes = wire.unpack_outcomes(merger.receive(Type.DONE))
        assert outcomes.tolist() == [wire.Outcome.MERGED]
        application.call("write", "a", 0, "02")
        merger.receive(Type.RESTORED)
        waits = wire.unpack(wire.STALLS, merger.receive(Type.STALLS))
        assert sum(waits) == 1
        assert application.call("read", "a", 0, 2) == "0201"
