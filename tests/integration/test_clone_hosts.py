"""Arenas that are cloned and migrated between the hosts of a real cluster."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from helpers.up import Up, running, samepage

import samepage as client
from samepage.cli.cluster import store_directory
from samepage.daemon.failpoints import VARIABLE
from samepage.reports import PAGE_SIZE
from samepage.v1 import arenas_pb2, arenas_pb2_grpc

PAGES = 2048
SIZE = PAGES * PAGE_SIZE
_SECONDS = 30.0

pytestmark = pytest.mark.needs("away")

_WRITER = """
import mmap, sys
import numpy as np
import samepage

node = samepage.connect(sys.argv[1])
arena = node.create_arena(sys.argv[2], int(sys.argv[3]))
words = np.frombuffer(arena.buffer, np.uint64)
words[:] = np.random.default_rng(5).integers(1, 1 << 62, words.size, np.uint64)
with open(sys.argv[4], "r+b") as file:
    written = np.frombuffer(mmap.mmap(file.fileno(), 4096), np.uint64)
print("ready", flush=True)
number, stride = 0, int(sys.argv[5])
while True:
    number += 1
    words[number * stride % words.size] = number
    written[0] = number
"""


@dataclass
class Hosts:
    """Two hosts, and where failpoints of their daemons are laid."""

    up: Up
    failpoints: Path
    names: Iterator[str]

    def name(self) -> str:
        """A name that no arena had."""
        return next(self.names)

    def lay(self, failpoint: str, action: str) -> Path:
        """Lay a failpoint; return its file, which goes when it acts."""
        file = self.failpoints / failpoint
        file.write_text(action)
        return file

    def notes(self) -> list[str]:
        """What the second host's merger notes of clones."""
        return [path.name for path in store(self.up, 2).glob("*.clone")]


def store(up: Up, number: int) -> Path:
    """Where a host has its store."""
    return store_directory(up.directory, f"host-{number}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="samepage-") as directory:
        failpoints = Path(directory) / "failpoints"
        failpoints.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, str(failpoints))
            with running(Path(directory) / "up", 2) as up:
                yield Hosts(up, failpoints, (f"arena-{number}" for number in range(1 << 30)))
            # What each host held for the other, which ended as well, stays in its store.
            for number in (1, 2):
                shutil.rmtree(store(up, number), ignore_errors=True)


@pytest.fixture
def one(hosts: Hosts) -> Iterator[client.Node]:
    with client.connect(hosts.up.host(1)) as node:
        yield node


@pytest.fixture
def two(hosts: Hosts) -> Iterator[client.Node]:
    with client.connect(hosts.up.host(2)) as node:
        yield node


def bytes_of(arena: client.Arena) -> npt.NDArray[np.uint8]:
    return np.frombuffer(arena.buffer, np.uint8)


def filled(node: client.Node, name: str, seed: int = 1) -> client.Arena:
    """An arena of pages of which no two are equal, but for the first 100, which hold zeros."""
    arena = node.create_arena(name, SIZE)
    data = bytes_of(arena)
    data[100 * PAGE_SIZE :] = np.random.default_rng(seed).integers(
        0, 256, SIZE - 100 * PAGE_SIZE, np.uint8
    )
    return arena


class TestClone:
    def test_copies_of_a_sealed_arena_are_sealed(
        self, hosts: Hosts, one: client.Node, two: client.Node
    ) -> None:
        source = filled(one, hosts.name(), seed=12)
        expected = bytes_of(source).copy()
        source.seal()
        for lazy in (False, True):
            copy = two.clone_arena(f"host-1/{source.name}", hosts.name(), lazy=lazy)
            assert copy.sealed
            assert copy.buffer.readonly
            assert (bytes_of(copy) == expected).all()
            with pytest.raises(client.SealedError):
                copy.discard(0, PAGE_SIZE)
        third = one.clone_arena(f"host-2/{copy.name}")
        assert third.sealed
        moved = two.migrate_arena(f"host-1/{source.name}")
        assert moved.sealed
        assert (bytes_of(moved) == expected).all()
        assert (bytes_of(third) == expected).all()

    def test_only_what_is_missing_is_fetched(
        self, hosts: Hosts, one: client.Node, two: client.Node
    ) -> None:
        source = filled(one, hosts.name(), seed=11)
        told: list[client.CloneProgress] = []
        copy = two.clone_arena(f"host-1/{source.name}", progress=told.append)
        assert (bytes_of(copy) == bytes_of(source)).all()
        fresh = (PAGES - 100) * PAGE_SIZE
        assert told[-1] == client.CloneProgress(0, fresh, 0)
        assert copy.stats().shared == PAGES - 100

        second = one.create_arena(hosts.name(), SIZE)
        bytes_of(second)[:] = bytes_of(source)
        changed = range(105, PAGES, 10)
        for page in changed:
            bytes_of(second)[page * PAGE_SIZE] ^= 0xFF
        again = two.clone_arena(f"host-1/{second.name}", progress=told.append)
        assert (bytes_of(again) == bytes_of(second)).all()
        moved = len(changed) * PAGE_SIZE
        assert told[-1] == client.CloneProgress(fresh - moved, moved, 0)
        eventually(lambda: not hosts.notes())

    def test_a_copy_and_its_source_go_their_own_ways(
        self, hosts: Hosts, one: client.Node, two: client.Node
    ) -> None:
        source = filled(one, hosts.name(), seed=12)
        before = bytes_of(source).copy()
        copy = two.clone_arena(f"host-1/{source.name}")
        bytes_of(source)[::PAGE_SIZE] = 1
        assert (bytes_of(copy) == before).all()
        bytes_of(copy)[1::PAGE_SIZE] = 2
        expected = before.copy()
        expected[1::PAGE_SIZE] = 2
        assert (bytes_of(copy) == expected).all()

    def test_lazy_clone_is_whole_for_threads_and_the_kernel(
        self, hosts: Hosts, one: client.Node, two: client.Node
    ) -> None:
        source = filled(one, hosts.name(), seed=13)
        copy = two.clone_arena(f"host-1/{source.name}", name=hosts.name(), lazy=True)
        theirs, ours = bytes_of(source), bytes_of(copy)
        wrong: list[int] = []

        def look(seed: int) -> None:
            for page in np.random.default_rng(seed).permutation(PAGES).tolist():
                part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                if (ours[part] != theirs[part]).any():
                    wrong.append(page)

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        with tempfile.TemporaryFile() as file:
            for page in range(0, PAGES, 64):
                part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                assert os.pwrite(file.fileno(), copy.buffer[part], 0) == PAGE_SIZE
                assert os.pread(file.fileno(), PAGE_SIZE, 0) == theirs[part].tobytes()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_bad_requests(self, hosts: Hosts, one: client.Node, two: client.Node) -> None:
        source = filled(one, hosts.name(), seed=14)
        taken = two.create_arena(hosts.name(), PAGE_SIZE)
        with pytest.raises(client.NotFoundError, match="host-9"):
            two.clone_arena(f"host-9/{source.name}")
        with pytest.raises(client.NotFoundError, match="missing"):
            two.clone_arena("host-1/missing")
        with pytest.raises(client.NotFoundError, match=source.name):
            two.clone_arena(f"host-1/{source.name}", domain="other")
        with pytest.raises(client.NameTakenError):
            two.clone_arena(f"host-1/{source.name}", name=taken.name)
        with pytest.raises(client.InvalidArgumentError):
            two.clone_arena("host-2/" + taken.name)
        eventually(lambda: not hosts.notes())


@contextlib.contextmanager
def writing(up: Up, name: str, counter: Path, stride: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process on the first host that writes a new arena of that name, every so many words."""
    counter.write_bytes(bytes(PAGE_SIZE))
    command = [sys.executable, "-c", _WRITER, up.host(1), name, SIZE, counter, stride]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            yield writer
        finally:
            writer.kill()


class TestMigrate:
    def test_a_host_that_is_in_the_cluster_is_not_forgotten(self, hosts: Hosts) -> None:
        done = samepage("forget-host", "host-2", "--dir", hosts.up.directory)
        assert done.returncode == 1
        assert "host 'host-2' is in the cluster" in done.stderr
        done = samepage("forget-host", "host-9", "--json", "--dir", hosts.up.directory)
        assert json.loads(done.stdout) == {"hosts": {"host-1": 0, "host-2": 0}}

    @pytest.mark.parametrize("stride", [4099, 0], ids=["all pages", "one page"])
    def test_no_write_of_a_busy_writer_is_lost(
        self, hosts: Hosts, two: client.Node, tmp_path: Path, stride: int
    ) -> None:
        name = hosts.name()
        counter = tmp_path / "written"
        with writing(hosts.up, name, counter, stride) as writer:
            told: list[client.CloneProgress] = []
            arena = two.migrate_arena(f"host-1/{name}", max_freeze=30.0, progress=told.append)
            assert writer.wait(60) == -signal.SIGBUS
        with counter.open("rb") as file:
            written = int(np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), "<u8")[0])
        words = np.frombuffer(arena.buffer, np.uint64)
        expected = np.random.default_rng(5).integers(1, 1 << 62, words.size, np.uint64)
        # The last write may have reached the memory, and not the counter.
        for last in (written, written + 1):
            numbers = np.arange(1, last + 1, dtype=np.uint64)
            at = numbers * np.uint64(stride) % np.uint64(words.size)
            expected[at.astype(np.intp)] = numbers
            if (words == expected).all():
                break
        assert (words == expected).all()
        assert 0 < told[-1].freeze_us < 30_000_000
        assert not any(arena.name == name for arena in client.connect(hosts.up.host(1)).arenas())

    def test_source_that_was_left_raises(
        self, hosts: Hosts, one: client.Node, two: client.Node
    ) -> None:
        source = filled(one, hosts.name(), seed=21)
        before = bytes_of(source).copy()
        arena = two.migrate_arena(f"host-1/{source.name}", max_freeze=30.0)
        assert (bytes_of(arena) == before).all()
        with pytest.raises(client.MigratedError):
            source.read(0, 1)
        bytes_of(arena)[:] = 7
        assert (bytes_of(arena) == 7).all()


class TestKilled:
    """The destination's merger dies, at each step: exactly one owner is left, with all bytes."""

    @pytest.mark.parametrize(
        "failpoint",
        ["clone.asked", "clone.snapshot", "clone.opened", "clone.away", "clone.fetched"],
    )
    @pytest.mark.parametrize("action", ["kill", "error"])
    def test_clone_vanishes_and_can_be_made_again(
        self, hosts: Hosts, one: client.Node, two: client.Node, failpoint: str, action: str
    ) -> None:
        source = filled(one, hosts.name(), seed=31)
        laid = hosts.lay(failpoint, action)
        name = hosts.name()
        with pytest.raises(client.SamepageError):
            two.clone_arena(f"host-1/{source.name}", name=name)
        assert not laid.exists()
        copy = again(lambda: two.clone_arena(f"host-1/{source.name}", name=name))
        assert (bytes_of(copy) == bytes_of(source)).all()
        eventually(lambda: not hosts.notes())

    @pytest.mark.parametrize("failpoint", ["migrate.round", "migrate.frozen", "migrate.noted"])
    def test_source_keeps_an_arena_that_it_was_not_asked_to_leave(
        self, hosts: Hosts, one: client.Node, two: client.Node, failpoint: str
    ) -> None:
        source = filled(one, hosts.name(), seed=32)
        before = bytes_of(source).copy()
        laid = hosts.lay(failpoint, "kill")
        with pytest.raises(client.SamepageError):
            two.migrate_arena(f"host-1/{source.name}", max_freeze=0.5)
        assert not laid.exists()
        assert (bytes_of(source) == before).all()
        bytes_of(source)[:] = 1
        eventually(lambda: not hosts.notes())

    def test_arena_that_was_left_arrives(
        self, hosts: Hosts, one: client.Node, two: client.Node
    ) -> None:
        source = filled(one, hosts.name(), seed=33)
        before = bytes_of(source).copy()
        laid = hosts.lay("migrate.left", "kill")
        arena = two.migrate_arena(f"host-1/{source.name}", max_freeze=30.0)
        assert not laid.exists()
        assert (bytes_of(arena) == before).all()
        with pytest.raises(client.MigratedError):
            source.read(0, 1)
        arena.close()
        eventually(lambda: not hosts.notes())


class TestSourceDied:
    """The source's merger has lost its store, and its application has ended, in a hand-over."""

    def test_operator_ends_the_wait(self, hosts: Hosts, two: client.Node, tmp_path: Path) -> None:
        name, counter = hosts.name(), tmp_path / "written"
        laid = hosts.lay("snapshot.leaving", "sleep 600")
        with ThreadPoolExecutor() as pool, writing(hosts.up, name, counter, 4099) as writer:
            moving = pool.submit(two.migrate_arena, f"host-1/{name}", max_freeze=30.0)
            eventually(lambda: not laid.exists())
            # Nobody has told it to leave: it is the only owner, and dies as that.
            assert not moving.done()
            # Nor can it say so to the next merger.
            writer.send_signal(signal.SIGSTOP)
            shutil.rmtree(store(hosts.up, 1))
            os.kill(hosts.up.daemons()["host-1/merger"], signal.SIGKILL)
            eventually(lambda: "host-1/merger" in hosts.up.daemons())
            refused = samepage("forget-host", "host-1", "--dir", hosts.up.directory)
            assert refused.returncode == 1
            assert "host 'host-1' is in the cluster" in refused.stderr
            assert not moving.done()
            writer.kill()
            writer.wait()
            eventually(lambda: forgotten(hosts))
            arena = moving.result(_SECONDS)
        assert bytes_of(arena).any()
        arena.close()
        eventually(lambda: not hosts.notes())


def forgotten(hosts: Hosts) -> bool:
    """Say that no other host has what the first one was asked for; whether that is believed."""
    done = samepage("forget-host", "host-1", "--json", "--dir", hosts.up.directory)
    return done.returncode == 0 and json.loads(done.stdout) == {"hosts": {"host-2": 1}}


class TestCommands:
    def test_clone_and_migrate(self, hosts: Hosts, one: client.Node) -> None:
        source = filled(one, hosts.name(), seed=41)
        place = ("--dir", hosts.up.directory)
        name = hosts.name()
        cloned = command("clone", f"host-1/{source.name}", "--to", "host-2", "--name", name, *place)
        fresh = (PAGES - 100) * PAGE_SIZE
        assert cloned == {
            "host": "host-2",
            "domain": "default",
            "arena": name,
            "size": SIZE,
            "local_bytes": 0,
            "fetched_bytes": fresh,
            "missing_bytes": 0,
            "freeze_microseconds": 0,
        }
        # The clone left the source as it was: that its pages are here the scanner must know.
        source.share(timeout=30.0)
        moved = command(
            "migrate", f"host-2/{name}", "--to", "host-1", "--max-freeze", "30s", *place
        )
        assert moved["local_bytes"] == fresh and moved["fetched_bytes"] == 0
        assert moved["freeze_microseconds"] > 0
        with grpc.insecure_channel(hosts.up.cluster.hosts[1].arenas) as channel:
            helper = arenas_pb2_grpc.ArenasStub(channel)
            with pytest.raises(grpc.RpcError) as gone:
                list(helper.ReadArena(arenas_pb2.ReadArenaRequest(arena=name)))
            assert gone.value.code() is grpc.StatusCode.NOT_FOUND
            helper.DeleteArena(arenas_pb2.DeleteArenaRequest(arena=name))

    def test_copy_that_was_interrupted_is_dropped(self, hosts: Hosts, one: client.Node) -> None:
        source = filled(one, hosts.name(), seed=42)
        name = hosts.name()
        laid = hosts.lay("clone.away", "sleep 2")
        arguments = ("clone", f"host-1/{source.name}", "--to", "host-2", "--name", name, "--dir")
        command = [sys.executable, "-m", "samepage", *arguments, str(hosts.up.directory)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as cloning:
            eventually(lambda: not laid.exists())
            cloning.send_signal(signal.SIGINT)
            assert cloning.wait(30) == 130
        with grpc.insecure_channel(hosts.up.cluster.hosts[1].arenas) as channel:
            helper = arenas_pb2_grpc.ArenasStub(channel)
            # The name is free when nothing is left of it.
            eventually(lambda: created(helper, name))
            helper.DeleteArena(arenas_pb2.DeleteArenaRequest(arena=name))
        eventually(lambda: not hosts.notes())

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (("clone", "x", "--to", "host-2"), 2, "HOST/ARENA"),
            (("clone", "host-1/x", "--to", "host-1"), 2, "already"),
            (("clone", "host-1/missing", "--to", "host-2"), 1, "missing"),
            (("clone", "host-7/x", "--to", "host-2"), 1, "host-7"),
            (("clone", "host-1/x", "--to", "host-7"), 1, "host-7"),
            (("migrate", "host-1/x", "--to", "host-2", "--max-freeze", "1h"), 2, "1h"),
        ],
    )
    def test_bad_arguments(
        self, hosts: Hosts, arguments: tuple[str, ...], code: int, text: str
    ) -> None:
        result = samepage(*arguments, "--dir", hosts.up.directory)
        assert result.returncode == code and text in result.stderr


def created(helper: arenas_pb2_grpc.ArenasStub, name: str) -> bool:
    """Make an arena of one page, if its name is free."""
    try:
        helper.CreateArena(arenas_pb2.CreateArenaRequest(arena=name, size=PAGE_SIZE))
    except grpc.RpcError as error:
        assert "held already" in str(error)
        return False
    return True


def again(make: Callable[[], client.Arena]) -> client.Arena:
    """Call until the merger is back."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return make()
        except (client.ServiceUnavailableError, client.NameTakenError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(*arguments: str | Path) -> dict[str, Any]:
    """Run the command, and return what it prints for programs."""
    result = samepage(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told
