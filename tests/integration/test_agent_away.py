"""Pages that are away from an arena, with a merger by hand: nobody ever reads zeros for them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.by_hand import SLOTS, Merger, Scanner, digest_of

from samepage.daemon import wire
from samepage.daemon.wire import Outcome, PageState, Type

pytestmark = pytest.mark.needs("root", "away")

PAGES = 600
DATA = content(5, PAGES)
ABSENT, PRIVATE, SHARED = 0, 4, 5
MADV_DONTNEED, MREMAP_FIXED_MAYMOVE = 4, 3
MERGED = Outcome.MERGED


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path)
    made.seal()
    yield made
    made.close()


@pytest.fixture
def application(merger: Merger, tmp_path: Path) -> Iterator[Application]:
    """With an arena `a`, all of it away."""
    with Application(tmp_path) as made:
        made.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        made.finish()
        assert merger.make_away(0, PAGES) == [MERGED] * PAGES
        yield made


def ranges(*pages: tuple[int, int]) -> bytes:
    return b"".join(wire.PAGE_RANGE.pack(*span) for span in pages)


def replace(page: int, count: int, slot: int) -> bytes:
    return wire.REPLACE.pack(1, 0) + struct.pack("<QQQ", page, count, slot)


def serve(merger: Merger, until: int) -> list[tuple[int, int]]:
    """Fill what is wanted, until so many pages were; what was asked for."""
    asked: list[tuple[int, int]] = []
    filled = 0
    waiting: list[tuple[int, int]] = []
    while filled < until:
        waiting += merger.wanted()
        asked += waiting
        while waiting:
            page, count = waiting.pop()
            if count > wire.READ_PAGES_MAX:
                waiting.append((page + wire.READ_PAGES_MAX, count - wire.READ_PAGES_MAX))
                count = wire.READ_PAGES_MAX
            merger.write_window(DATA[page * PAGE : (page + count) * PAGE])
            merger.order(Type.FILL, ranges((page, count)))
            while (answer := receive(merger)).type is Type.FETCH:
                more = wire.unpack_records(wire.RANGE, answer).tolist()
                asked += more
                waiting += more
            _, outcomes = wire.unpack_outcomes(answer)
            assert outcomes.tolist() == [MERGED] * count
            filled += count
    return asked


def receive(merger: Merger) -> wire.Message:
    message = wire.parse(merger.agent.recv(wire.MESSAGE_MAX))
    while message.type is Type.STALLS:
        message = wire.parse(merger.agent.recv(wire.MESSAGE_MAX))
    return message


def fill_all(merger: Merger) -> None:
    for page in range(0, PAGES, wire.READ_PAGES_MAX):
        count = min(wire.READ_PAGES_MAX, PAGES - page)
        merger.fill(DATA, (page, count))


def test_a_touched_page_waits_for_its_bytes(merger: Merger, application: Application) -> None:
    stats = {"pages": PAGES, "private": 0, "shared": 0, "absent": 0, "evicted": PAGES}
    application.start("stats", "a")
    asked = merger.receive(Type.ACCOUNT)
    merger.agent.send(wire.pack(Type.ACCOUNTED, asked.seq, 1, wire.ACCOUNTED.pack(0, 0)))
    assert application.finish() == {**stats, "saved_bytes": 0}
    application.start("read", "a", 7 * PAGE, PAGE)
    assert merger.wanted() == [(7, 1)]
    assert merger.fill(DATA, (7, 1)) == [MERGED]
    assert application.finish() == DATA[7 * PAGE : 8 * PAGE].hex()
    assert merger.fill(DATA, (7, 1)) == [Outcome.BUSY]
    assert application.call("pagemap", "a") == [ABSENT] * 7 + [PRIVATE] + [ABSENT] * (PAGES - 8)
    # a page filled in the middle of others splits no mapping
    assert [pages for _, pages, _, _ in application.call("mappings", "a")] == [PAGES]
    fill_all(merger)
    assert application.call("read", "a", 0, PAGES * PAGE) == DATA.hex()
    assert [pages for _, pages, _, _ in application.call("mappings", "a")] == [PAGES]


def test_many_threads_touch_at_once(merger: Merger, application: Application) -> None:
    application.start("touch", "a", list(range(PAGES)), 16)
    asked = serve(merger, PAGES)
    assert sum(count for _, count in asked) == PAGES  # nothing twice
    assert application.finish() == []
    assert application.call("read", "a", 0, PAGES * PAGE) == DATA.hex()


def test_reading_ahead_grows_with_sequential_touches(
    merger: Merger, application: Application
) -> None:
    application.start("touch", "a", list(range(PAGES)), 1)
    asked = serve(merger, PAGES)
    assert application.finish() == []
    assert asked == [(0, 1), (1, 2), (3, 4), (7, 8), (15, 16), (31, 32), (63, 64)] + [
        (at, min(128, PAGES - at)) for at in range(127, PAGES, 128)
    ]


def test_scattered_touches_ask_for_single_pages(merger: Merger, application: Application) -> None:
    pages = [500, 20, 300, 100, 7]
    application.start("touch", "a", pages, 1)
    assert serve(merger, len(pages)) == [(page, 1) for page in pages]
    assert application.finish() == []


def test_the_kernel_waits_too(merger: Merger, application: Application) -> None:
    application.start("read_by_kernel", "a", 10, 3)
    serve(merger, 3)
    assert application.finish() == DATA[10 * PAGE : 13 * PAGE].hex()


def test_away_pages_take_slots(merger: Merger, application: Application) -> None:
    for slot in range(1, SLOTS):
        merger.write_slot(slot, DATA[(99 + slot) * PAGE : (100 + slot) * PAGE])
    merger.fill(DATA, (102, 1))
    application.start("touch", "a", [100], 1)
    assert merger.wanted() == [(100, 1)]
    assert merger.outcomes(Type.REPLACE, replace(100, 10, 1)) == [MERGED] * 10
    assert application.finish() == []
    assert application.call("pagemap", "a")[99:111] == [ABSENT] + [SHARED] * 10 + [ABSENT]
    assert application.call("read", "a", 100 * PAGE, 10 * PAGE) == (
        DATA[100 * PAGE : 110 * PAGE].hex()
    )
    application.call("write", "a", 105 * PAGE, "abcd")
    notice = wire.unpack_records(wire.RANGE, merger.receive(Type.RESTORED))
    assert notice.tolist() == [(105, 1)]
    assert merger.outcomes(Type.REPLACE, replace(200, 5, 0)) == [MERGED] * 5
    assert application.call("read", "a", 200 * PAGE, 5 * PAGE) == bytes(5 * PAGE).hex()


@pytest.mark.needs("tracking")
def test_pages_that_came_back_are_followed_again(
    merger: Merger, application: Application, tmp_path: Path
) -> None:
    scanner = Scanner(tmp_path)
    try:
        scanner.seal()
        scanner.welcome()
        scanner.open_arena()
        assert scanner.changed(0, PAGES) == []
        assert scanner.fingerprint((0, 2))[1] == [PageState.ABSENT] * 2
        fill_all(merger)
        assert scanner.changed(0, PAGES) == [(0, PAGES)]
        assert scanner.changed(0, PAGES) == []
        application.call("write", "a", 9 * PAGE, "01")
        assert scanner.changed(0, PAGES) == [(9, 1)]
    finally:
        scanner.close()


def test_orders_see_absent_pages(merger: Merger, application: Application) -> None:
    merger.fill(DATA, (3, 1))
    expected = [Outcome.ABSENT] * 3 + [MERGED, Outcome.ABSENT]
    assert merger.outcomes(Type.READ, ranges((0, 5))) == expected
    assert merger.read_window(3 * PAGE, PAGE) == DATA[3 * PAGE : 4 * PAGE]
    assert merger.ask(Type.COUNT, b"") == 0
    assert merger.read_window(0, 8) == bytes(8)


def test_only_absent_pages_become_away(merger: Merger, application: Application) -> None:
    fill_all(merger)
    application.call("discard", "a", 10, 3)
    application.call("write", "a", 11 * PAGE, "0102")
    assert merger.make_away(8, 6) == [1 + 3, 4, MERGED, Outcome.BUSY, MERGED, 4]
    assert application.call("read", "a", 11 * PAGE, 3) == "010200"
    application.start("read", "a", 10 * PAGE, PAGE)
    merger.wanted()
    merger.fill(DATA, (10, 1))
    assert application.finish() == DATA[10 * PAGE : 11 * PAGE].hex()


def test_a_merger_that_comes_back_learns_what_is_away(
    merger: Merger, application: Application
) -> None:
    merger.fill(DATA, (0, 2), (50, 1))
    application.start("touch", "a", [300], 1)
    assert merger.wanted() == [(300, 1)]
    merger.agent.shutdown(socket.SHUT_RDWR)
    merger.welcome()
    opened = merger.receive(Type.ARENA_OPEN)
    wanted = wire.unpack_arena_open(opened)
    assert (wanted.extents, wanted.away, wanted.left) == (0, PAGES - 3, bytes(16))
    told: list[tuple[int, bytes]] = []
    while len(told) < wanted.away:
        told += wire.unpack_records(wire.AWAY, merger.receive(Type.AWAY_PAGES)).tolist()
    expected = [page for page in range(2, PAGES) if page != 50]
    assert told == [(page, digest_of(page)) for page in expected]
    answer = wire.pack(Type.ARENA_OPENED, opened.seq, 1, wire.ARENA_OPENED.pack(7))
    socket.send_fds(merger.agent, [answer], [merger.store])
    assert merger.wanted() == [(300, 1)]  # asked for again
    merger.fill(DATA, (300, 1))
    assert application.finish() == []


def test_lost_pages_are_an_error(merger: Merger, application: Application) -> None:
    assert merger.outcomes(Type.POISON, ranges((10, 2))) == [MERGED] * 2
    assert merger.outcomes(Type.POISON, ranges((11, 2))) == [Outcome.BUSY, MERGED]
    assert merger.fill(DATA, (11, 1)) == [Outcome.BUSY]
    assert merger.outcomes(Type.READ, ranges((10, 1))) == [Outcome.ABSENT]
    with pytest.raises(ApplicationError, match="LostError"):
        application.call("fetch_read", "a", 11 * PAGE + 5, 10)
    application.start("fetch_read", "a", 9 * PAGE, 10)
    merger.wanted()
    merger.fill(DATA, (9, 1))
    assert application.finish() == DATA[9 * PAGE : 9 * PAGE + 10].hex()
    application.start("fetch", "a", 0, PAGES * PAGE, 0.2)
    with pytest.raises(ApplicationError, match="FetchTimeoutError"):
        application.finish()
    with pytest.raises(ApplicationError, match=r"it ended with -7"):  # SIGBUS
        application.call("read", "a", 12 * PAGE, 1)


def test_who_waits_for_a_page_that_is_lost_is_told(
    merger: Merger, application: Application
) -> None:
    application.start("read", "a", 12 * PAGE, 1)
    merger.wanted()
    merger.order(Type.POISON, ranges((12, 1)))
    with pytest.raises(ApplicationError, match=r"it ended with -7"):
        application.finish()


@pytest.mark.parametrize("call", ["unshare", "close"])
def test_everything_comes_back_first(merger: Merger, application: Application, call: str) -> None:
    application.start("close", "a", True) if call == "close" else application.start(call, "a")
    serve(merger, PAGES)
    application.finish()
    assert application.call("read", "a", 0, PAGES * PAGE) == DATA.hex()
    assert [pages for _, pages, _, _ in application.call("mappings", "a")] == [PAGES]


def test_disconnecting_brings_everything_back(merger: Merger, application: Application) -> None:
    application.start("disconnect")
    serve(merger, PAGES)
    application.finish()
    assert application.call("read", "a", 0, PAGES * PAGE) == DATA.hex()


def test_what_is_discarded_is_zero(merger: Merger, application: Application) -> None:
    merger.fill(DATA, (12, 1), (33, 1))
    application.call("discard", "a", 10, 5)
    application.call("system", "madvise", "a", 30, 5, MADV_DONTNEED)
    assert application.call("read", "a", 10 * PAGE, 5 * PAGE) == bytes(5 * PAGE).hex()
    assert application.call("read", "a", 30 * PAGE, 5 * PAGE) == bytes(5 * PAGE).hex()
    assert merger.fill(DATA, (9, 2), (30, 1)) == [MERGED, Outcome.BUSY, Outcome.BUSY]
    application.call("write", "a", 31 * PAGE, "07")
    assert application.call("read", "a", 31 * PAGE, 2) == "0700"
    application.call("system", "madvise", "a", 31, 1, MADV_DONTNEED)
    assert application.call("read", "a", 31 * PAGE, 2) == "0000"


def test_pages_that_are_moved_while_they_are_away_are_lost(
    merger: Merger, application: Application
) -> None:
    merger.fill(DATA, (41, 1))
    address = application.call("reserve", 8)
    application.call("system", "mremap", "a", 40, 8, 8 * PAGE, MREMAP_FIXED_MAYMOVE, address)
    assert application.call("read_at", address + PAGE, PAGE) == DATA[41 * PAGE : 42 * PAGE].hex()
    assert merger.fill(DATA, (39, 2)) == [MERGED, Outcome.BUSY]
    with pytest.raises(ApplicationError, match=r"it ended with -7"):
        application.call("read_at", address, 1)


def test_what_is_unmapped_is_the_applications(merger: Merger, application: Application) -> None:
    both, fixed_anonymous = 3, 0x32
    application.call("system", "munmap", "a", 30, 10)
    application.call("system", "mmap", "a", 30, 2, both, fixed_anonymous, 2**64 - 1, 0)
    application.call("write", "a", 30 * PAGE, "1234")
    assert merger.outcomes(Type.REPLACE, replace(29, 2, 1)) == [MERGED, Outcome.BUSY]
    assert merger.fill(DATA, (30, 3)) == [Outcome.BUSY] * 3
    assert application.call("read", "a", 30 * PAGE, 3) == "123400"
    assert merger.fill(DATA, (40, 1)) == [MERGED]
    assert application.call("read", "a", 40 * PAGE, 9) == DATA[40 * PAGE : 40 * PAGE + 9].hex()


BAD = {
    "away beyond the arena": (Type.AWAY, PAGES.to_bytes(8, "little") + bytes(32)),
    "away backwards": (Type.AWAY, (2).to_bytes(8, "little") + bytes(64) + bytes(8)),
    "away of nothing": (Type.AWAY, b""),
    "away of a part": (Type.AWAY, bytes(39)),
    "fill beyond the arena": (Type.FILL, ranges((PAGES - 1, 2))),
    "fill of more than the window holds": (Type.FILL, ranges((0, 513))),
    "fill of nothing": (Type.FILL, b""),
    "fill of a part": (Type.FILL, bytes(15)),
    "poison beyond the arena": (Type.POISON, ranges((1, PAGES))),
    "poison backwards": (Type.POISON, ranges((5, 1), (3, 1))),
    "poison that wraps": (Type.POISON, ranges((2**64 - 1, 2))),
}


def test_bad_orders_end_the_connection(merger: Merger, application: Application) -> None:
    for name, (kind, payload) in BAD.items():
        merger.order(kind, payload)
        assert merger.agent.recv(wire.MESSAGE_MAX) == b"", name
        merger.welcome()
        merger.announced()
    fill_all(merger)
    assert application.call("read", "a", 0, PAGES * PAGE) == DATA.hex()
