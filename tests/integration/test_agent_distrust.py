"""An agent trusts no daemon: what breaks the protocol ends the connection, and nothing else."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, content
from helpers.by_hand import SLOTS, WINDOW, Merger

from samepage.daemon import wire
from samepage.daemon.wire import Type

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PAGES = 8


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path)
    yield made
    made.close()


def replace(*runs: tuple[int, int, int]) -> bytes:
    return wire.REPLACE.pack(len(runs), 0) + b"".join(struct.pack("<QQQ", *run) for run in runs)


BAD = {
    "garbage": b"\xff" * 64,
    "short": b"SP",
    "wrong magic": b"\0\0" + wire.pack(Type.READ, 1, 1, wire.PAGE_RANGE.pack(0, 1))[2:],
    "the version before": wire.HEADER.pack(wire.MAGIC, wire.VERSION - 1, Type.READ, 32, 1, 1)
    + wire.PAGE_RANGE.pack(0, 1),
    "wrong version": wire.HEADER.pack(wire.MAGIC, 9, Type.READ, 32, 1, 1)
    + wire.PAGE_RANGE.pack(0, 1),
    "wrong length": wire.HEADER.pack(wire.MAGIC, wire.VERSION, Type.READ, 99, 1, 1)
    + wire.PAGE_RANGE.pack(0, 1),
    "unknown type": wire.HEADER.pack(wire.MAGIC, wire.VERSION, 77, 16, 1, 1),
    "a daemon's order to the other thread": wire.pack(
        Type.FINGERPRINT, 1, 1, wire.PAGE_RANGE.pack(0, 1)
    ),
    "second welcome": wire.pack(Type.WELCOME, 1, 0, wire.WELCOME.pack(WINDOW, 0, 0)),
    "read beyond the arena": wire.pack(Type.READ, 1, 1, wire.PAGE_RANGE.pack(PAGES, 1)),
    "read that wraps": wire.pack(Type.READ, 1, 1, wire.PAGE_RANGE.pack(2**64 - 1, 2)),
    "read of nothing": wire.pack(Type.READ, 1, 1, wire.PAGE_RANGE.pack(0, 0)),
    "read larger than the window": wire.pack(Type.READ, 1, 1, wire.PAGE_RANGE.pack(0, 257)),
    "replace beyond the arena": wire.pack(Type.REPLACE, 1, 1, replace((PAGES - 1, 2, 1))),
    "replace beyond the store": wire.pack(Type.REPLACE, 1, 1, replace((0, 2, SLOTS - 1))),
    "replace with slots that wrap": wire.pack(Type.REPLACE, 1, 1, replace((0, 2, 2**64 - 1))),
    "replace with fewer runs than it says": wire.pack(
        Type.REPLACE, 1, 1, wire.REPLACE.pack(3, 0) + struct.pack("<QQQ", 0, 1, 1)
    ),
    "replace of more runs than a message holds": wire.pack(
        Type.REPLACE, 1, 1, wire.REPLACE.pack(2**32 - 1, 0)
    ),
    "replace of more pages than an order may": wire.pack(
        Type.REPLACE, 1, 1, replace(*[(0, PAGES, 0)] * 600)
    ),
    "restore beyond the arena": wire.pack(Type.RESTORE, 1, 1, wire.PAGE_RANGE.pack(1, PAGES)),
    "short restore": wire.pack(Type.RESTORE, 1, 1, b"\0" * 8),
}


def test_bad_messages_end_the_connection_alone(merger: Merger, tmp_path: Path) -> None:
    merger.seal()
    with Application(tmp_path) as application:
        application.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        application.finish()
        application.call("fill", "a", 3)
        for name, packet in BAD.items():
            merger.agent.send(packet)
            assert merger.agent.recv(wire.MESSAGE_MAX) == b"", name
            merger.welcome()  # and it comes again
            merger.open_arena()
        assert bytes.fromhex(application.call("read", "a", 0, PAGES * PAGE)) == content(3, PAGES)
        application.call("write", "a", 0, "01")
        merger.order(Type.READ, wire.PAGE_RANGE.pack(0, PAGES))
        error, outcomes = wire.unpack_outcomes(merger.receive(Type.DONE))
        assert error == 0 and outcomes.tolist() == [wire.Outcome.MERGED] * PAGES
        expected = b"\x01" + content(3, PAGES)[1:]
        assert os.pread(merger.window, PAGES * PAGE, 0) == expected


def test_order_for_an_unknown_arena_is_refused(merger: Merger, tmp_path: Path) -> None:
    merger.seal()
    with Application(tmp_path) as application:
        application.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        application.finish()
        for kind, payload in (
            (Type.READ, wire.PAGE_RANGE.pack(0, 1)),
            (Type.REPLACE, replace((0, 1, 1))),
            (Type.RESTORE, wire.PAGE_RANGE.pack(0, 1)),
        ):
            merger.agent.send(wire.pack(kind, 5, 2, payload))
            done = merger.receive(Type.DONE)
            assert done.seq == 5 and wire.unpack_outcomes(done)[0] == 2  # ENOENT


def test_window_that_may_shrink_is_refused(merger: Merger, tmp_path: Path) -> None:
    with Application(tmp_path) as application:
        application.start("create", "a", PAGES)
        merger.welcome()
        with pytest.raises(Exception, match="is no samepage daemon"):
            application.finish()


def test_slots_that_hold_other_bytes_change_nothing(merger: Merger, tmp_path: Path) -> None:
    merger.seal()
    with Application(tmp_path) as application:
        application.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        application.finish()
        application.call("fill", "a", 3)
        os.pwrite(merger.store, content(3, PAGES)[: 2 * PAGE], PAGE)
        merger.order(Type.REPLACE, replace((0, PAGES, 1)))
        _, outcomes = wire.unpack_outcomes(merger.receive(Type.DONE))
        assert outcomes.tolist() == [wire.Outcome.MERGED] * 2 + [wire.Outcome.DIFFERS] * (PAGES - 2)
        merger.order(Type.REPLACE, replace((0, 2, 1), (2, 2, 0)))
        _, outcomes = wire.unpack_outcomes(merger.receive(Type.DONE))
        assert outcomes.tolist() == [wire.Outcome.BUSY] * 2 + [wire.Outcome.DIFFERS] * 2
        assert bytes.fromhex(application.call("read", "a", 0, PAGES * PAGE)) == content(3, PAGES)
        # a write tells the merger, in the order in which things happened
        application.call("write", "a", PAGE, "ff")
        notice = wire.unpack_records(wire.RANGE, merger.receive(Type.RESTORED))
        assert notice.tolist() == [(1, 1)]


def test_store_that_is_gone_is_left(merger: Merger, tmp_path: Path) -> None:
    merger.seal()
    with Application(tmp_path) as application:
        application.start("create", "a", PAGES)
        merger.welcome()
        merger.open_arena()
        application.finish()
        application.call("fill", "a", 3)
        os.pwrite(merger.store, content(3, PAGES), PAGE)
        merger.order(Type.REPLACE, replace((0, PAGES, 1)))
        merger.receive(Type.DONE)
        merger.agent.shutdown(socket.SHUT_RDWR)
        merger.welcome()
        wanted = wire.unpack_arena_open(merger.receive(Type.ARENA_OPEN))
        assert (wanted.lock, wanted.extents) == (7, 1)
        extents = wire.unpack_records(wire.EXTENT, merger.receive(Type.EXTENTS))
        assert extents.tolist() == [(0, PAGES, 1)]
        refusal = wire.REFUSED.pack(116) + b"another store"  # ESTALE
        merger.agent.send(wire.pack(Type.REFUSED, 0, 1, refusal))
        again = wire.unpack_arena_open(merger.receive(Type.ARENA_OPEN))
        assert (again.lock, again.extents, again.name) == (0, 0, "a")
        assert application.call("pagemap", "a") == [4] * PAGES
        assert bytes.fromhex(application.call("read", "a", 0, PAGES * PAGE)) == content(3, PAGES)
