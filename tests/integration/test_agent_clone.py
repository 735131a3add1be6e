"""Clones, migrations and evictions as an application asks for them, with a merger by hand."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.by_hand import Merger

from samepage.daemon import wire
from samepage.daemon.wire import Outcome, Type

pytestmark = pytest.mark.needs("root", "away")

PAGES = 8
DATA = content(3, PAGES)
MIGRATE = 2


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path)
    made.seal()
    yield made
    made.close()


@pytest.fixture
def application(merger: Merger, tmp_path: Path) -> Iterator[Application]:
    with Application(tmp_path) as made:
        made.start("descriptors")
        merger.welcome()
        made.finish()
        yield made


def asked(merger: Merger) -> tuple[wire.Message, tuple[int, ...], list[str]]:
    """The CLONE that comes next: what it says, in numbers and names."""
    message = merger.receive(Type.CLONE)
    flags, freeze, *lengths = wire.CLONE.unpack_from(message.payload)
    names, at = [], wire.CLONE.size
    for length in lengths:
        names.append(message.payload[at : at + length].decode())
        at += length
    assert at == len(message.payload)
    return message, (flags, freeze), names


def tell(
    merger: Merger,
    clone: wire.Message,
    *counts: int,
    freeze: int | None = None,
    sealed: bool = False,
) -> None:
    if freeze is None:
        kind, payload = Type.CLONING, wire.CLONING.pack(PAGES, *counts)
    else:
        kind, payload = Type.CLONED, wire.CLONED.pack(PAGES, *counts, freeze, sealed)
    merger.agent.send(wire.pack(kind, clone.seq, clone.arena, payload))


def refuse(merger: Merger, clone: wire.Message, error: int, text: str) -> None:
    payload = wire.REFUSED.pack(error) + text.encode()
    merger.agent.send(wire.pack(Type.REFUSED, clone.seq, clone.arena, payload))


def mappings(application: Application) -> int:
    """How many an application has that has cloned before, and whose clones need no new stack for
    their thread, even when the one before has not quite ended."""
    application.call("run_threads", 4)
    with pytest.raises(ApplicationError, match="InvalidArgumentError"):
        application.call("clone", "clone_arena", "host-b/no/name", "copy")
    count: int = application.call("mapping_count")
    return count


def test_a_clone_arrives_page_by_page(merger: Merger, application: Application) -> None:
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, numbers, names = asked(merger)
    assert (numbers, names) == ((0, 0), ["host-b", "source", "copy", ""])
    tell(merger, clone, 0, 0, PAGES)
    wanted = merger.open_arena()
    assert (wanted.name, wanted.pages, wanted.away) == ("copy", PAGES, 0)
    assert merger.make_away(0, PAGES) == [Outcome.MERGED] * PAGES
    assert merger.fill(DATA, (0, PAGES)) == [Outcome.MERGED] * PAGES
    tell(merger, clone, 2, 4, 2)
    tell(merger, clone, 2, 6, 0, freeze=0)
    told = application.finish()
    assert told[-1] == [2 * PAGE, 6 * PAGE, 0, 0]
    assert application.call("read", "copy", 0, PAGES * PAGE) == DATA.hex()


def replace(merger: Merger, flags: int, *runs: tuple[int, int, int]) -> list[int]:
    payload = wire.REPLACE.pack(len(runs), flags)
    return merger.outcomes(
        Type.REPLACE, payload + b"".join(struct.pack("<QQQ", *run) for run in runs)
    )


@pytest.mark.parametrize("sealed", [False, True])
def test_absent_pages_of_a_clone_map_slots_at_once(
    merger: Merger, application: Application, sealed: bool
) -> None:
    for page in range(PAGES):
        merger.write_slot(3 + page, DATA[page * PAGE : (page + 1) * PAGE])
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    # One of them is filled; an order without the flag, or for a page that is there, takes none.
    assert merger.make_away(4, 1) == [Outcome.MERGED]
    assert merger.fill(DATA, (4, 1)) == [Outcome.MERGED]
    assert replace(merger, 0, (0, 2, 3)) == [Outcome.ABSENT] * 2
    assert replace(merger, wire.REPLACE_ABSENT, (4, 1, 3)) == [Outcome.DIFFERS]
    runs = ((0, 4, 3), (5, 3, 8))
    assert replace(merger, wire.REPLACE_ABSENT, *runs) == [Outcome.MERGED] * 7
    assert replace(merger, wire.REPLACE_ABSENT, (1, 1, 9)) == [Outcome.BUSY]
    tell(merger, clone, 7, 1, 0, freeze=0, sealed=sealed)
    application.finish()
    if sealed:
        assert merger.receive(Type.SEALED).arena == clone.arena
    assert application.call("read", "copy", 0, PAGES * PAGE) == DATA.hex()
    assert application.call("writable", "copy") is not sealed
    if not sealed:
        application.call("write", "copy", 2 * PAGE, "ff")
        assert merger.receive(Type.RESTORED).payload == wire.PAGE_RANGE.pack(2, 1)
        expected = DATA[: 2 * PAGE] + b"\xff" + DATA[2 * PAGE + 1 :]
        assert application.call("read", "copy", 0, PAGES * PAGE) == expected.hex()


def test_what_mlockall_filled_is_not_absent(merger: Merger, application: Application) -> None:
    merger.write_slot(3, DATA[:PAGE])
    application.call("lock_memory")
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    assert replace(merger, wire.REPLACE_ABSENT, (0, 1, 3)) == [Outcome.UNSUPPORTED]
    assert merger.make_away(0, 1) == [Outcome.MERGED]
    assert replace(merger, 0, (0, 1, 3)) == [Outcome.MERGED]
    tell(merger, clone, 1, 0, 0, freeze=0)
    application.finish()
    assert application.call("read", "copy", 0, PAGE) == DATA[:PAGE].hex()


def test_arenas_that_the_application_knows_are_compared(
    merger: Merger, application: Application
) -> None:
    """Whatever the merger says."""
    merger.write_slot(3, DATA[:PAGE])
    application.start("create", "own", PAGES)
    merger.open_arena()
    application.finish()
    assert replace(merger, wire.REPLACE_ABSENT, (0, 1, 3)) == [Outcome.ABSENT]
    application.call("write", "own", 0, "01")
    assert replace(merger, wire.REPLACE_ABSENT, (0, 1, 3)) == [Outcome.DIFFERS]
    assert application.call("read", "own", 0, 2) == "0100"


def test_the_clone_of_a_sealed_arena_is_sealed(merger: Merger, application: Application) -> None:
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    assert merger.make_away(0, PAGES) == [Outcome.MERGED] * PAGES
    assert merger.fill(DATA, (0, 4)) == [Outcome.MERGED] * 4
    tell(merger, clone, 0, 4, PAGES - 4, freeze=0, sealed=True)
    application.finish()
    assert merger.receive(Type.SEALED).arena == clone.arena
    assert not application.call("writable", "copy")
    assert merger.fill(DATA, (4, PAGES - 4)) == [Outcome.MERGED] * (PAGES - 4)
    assert application.call("read", "copy", 0, PAGES * PAGE) == DATA.hex()
    assert set(application.call("protections", "copy", 0, PAGES)) == {"r--p"}
    # A merger that starts anew is told before it may think otherwise.
    merger.agent.close()
    merger.welcome()
    assert merger.receive(Type.SEALED).arena == clone.arena
    assert merger.open_arena().name == "copy"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (2, "NotFoundError"),
        (11, "ServiceUnavailableError"),
        (17, "NameTakenError"),
        (110, "CloneTimeoutError"),
        (5, "SamepageError"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_clone_that_is_refused_leaves_nothing(
    merger: Merger, application: Application, error: int, kind: str, late: bool
) -> None:
    before = mappings(application)
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    if late:
        tell(merger, clone, 0, 0, PAGES)
        merger.open_arena()
        merger.make_away(0, PAGES)
    refuse(merger, clone, error, "so it is")
    with pytest.raises(ApplicationError, match=f"{kind}: so it is"):
        application.finish()
    merger.receive(Type.ARENA_CLOSE)
    assert application.call("mapping_count") <= before + 1


def test_a_clone_that_takes_too_long_is_given_up(merger: Merger, application: Application) -> None:
    application.start("clone", "clone_arena", "host-b/source", "copy", 0.2)
    clone, _, _ = asked(merger)
    with pytest.raises(ApplicationError, match="CloneTimeoutError"):
        application.finish()
    merger.receive(Type.ARENA_CLOSE)
    tell(merger, clone, 0, 0, PAGES)  # too late
    application.start("create", "other", PAGES)
    merger.open_arena()
    application.finish()


@pytest.mark.parametrize("starting", [False, True])
def test_ctrl_c_ends_a_clone_at_once(
    merger: Merger, application: Application, starting: bool
) -> None:
    before = mappings(application)
    application.start("clone_until_interrupted", "host-b/source", "copy", starting)
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    merger.make_away(0, PAGES)
    os.kill(application.process.pid, signal.SIGINT)
    assert application.finish() is True
    assert merger.receive(Type.ARENA_CLOSE).arena == clone.arena
    assert application.call("mapping_count") <= before + 1


def test_what_progress_raises_ends_the_clone(merger: Merger, application: Application) -> None:
    application.start("clone_until_told", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    with pytest.raises(ApplicationError, match="LookupError: enough"):
        application.finish()
    assert merger.receive(Type.ARENA_CLOSE).arena == clone.arena


def test_a_clone_ends_with_its_connection(merger: Merger, application: Application) -> None:
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    merger.make_away(0, PAGES)
    merger.agent.close()
    with pytest.raises(ApplicationError, match="ServiceUnavailableError"):
        application.finish()
    merger.welcome()
    merger.order(Type.READ, wire.PAGE_RANGE.pack(0, 1))
    error, _ = wire.unpack_outcomes(merger.receive(Type.DONE))
    assert error == errno.ENOENT
    application.start("create", "other", PAGES)
    assert merger.open_arena().name == "other"
    application.finish()


def test_a_migration_outlives_its_connection(merger: Merger, application: Application) -> None:
    application.start("clone", "migrate_arena", "host-b/source", "copy", 1.0)
    clone, numbers, _ = asked(merger)
    assert numbers == (MIGRATE, 500)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    merger.make_away(0, PAGES)
    merger.fill(DATA, (0, 5))
    merger.agent.close()
    merger.welcome()
    assert merger.announced().away == 3
    again, numbers, _ = asked(merger)
    assert (again.arena, numbers[0]) == (clone.arena, MIGRATE)
    merger.fill(DATA, (5, 3))
    tell(merger, again, 0, PAGES, 0, freeze=1234)
    application.finish()
    assert application.call("read", "copy", 0, PAGES * PAGE) == DATA.hex()


def test_a_migration_that_the_merger_forgot_is_dropped(
    merger: Merger, application: Application
) -> None:
    application.start("clone", "migrate_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    tell(merger, clone, 0, 0, PAGES)
    merger.open_arena()
    merger.agent.close()
    merger.welcome()
    merger.announced()
    again, _, _ = asked(merger)
    refuse(merger, again, 2, "nothing is known of it")
    with pytest.raises(ApplicationError, match="NotFoundError: nothing is known"):
        application.finish()
    merger.receive(Type.ARENA_CLOSE)


@pytest.mark.parametrize("source", ["", "host", "host/", "/arena"])
def test_sources_that_are_none(merger: Merger, application: Application, source: str) -> None:
    with pytest.raises(ApplicationError, match=r"InvalidArgumentError: .*HOST/ARENA"):
        application.call("clone", "clone_arena", source, "copy")


@pytest.mark.parametrize("payload", [bytes(31), bytes(32), bytes(40)])
def test_bad_answers_end_the_connection(
    merger: Merger, application: Application, payload: bytes
) -> None:
    application.start("clone", "clone_arena", "host-b/source", "copy")
    clone, _, _ = asked(merger)
    merger.agent.send(wire.pack(Type.CLONING, clone.seq, clone.arena, payload))
    with pytest.raises(ApplicationError, match="ServiceUnavailableError"):
        application.finish()
    merger.welcome()


def test_evicting_by_the_application(merger: Merger, application: Application) -> None:
    application.start("create", "a", PAGES)
    merger.open_arena()
    application.finish()
    application.start("evict", "a")
    wanted = merger.receive(Type.EVICT_ARENA)
    assert wire.unpack(wire.PAGE_RANGE, wanted) == (0, PAGES)
    payload = wire.EVICTED.pack(1, 2, 3, 2)
    merger.agent.send(wire.pack(Type.EVICTED, wanted.seq, 1, payload))
    assert application.finish() == {"held_elsewhere": 1, "spilled": 2, "kept": 3, "no_room": 2}
    application.start("evict", "a")
    wanted = merger.receive(Type.EVICT_ARENA)
    refuse(merger, wanted, 107, "eviction is switched off")
    with pytest.raises(ApplicationError, match="ServiceUnavailableError: eviction is"):
        application.finish()
