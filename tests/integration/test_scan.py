"""`samepage scan` against processes with known memory, and arenas."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from application import Application
from helpers.up import Up, running, samepage
from matplotlib import image

from samepage.cli import daemons, places
from samepage.scan import compare, memory
from samepage.scan.compare import Kind

PAGE = 4096
COMMON, ZEROS, OWN, TWINS = 300, 100, 50, 10

# Memory at an address of its own, which it prints: COMMON pages that all have, ZEROS that were
# touched, OWN of its own, and one page TWINS times that no other process has. With an argument it
# forks a child that holds the same physical pages.
HOLDER = f"""
import ctypes, mmap, os, random, sys
pages = {COMMON + ZEROS + OWN + TWINS}
held = mmap.mmap(-1, pages * {PAGE}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
twin = os.urandom({PAGE})
for page in range(pages):
    if page < {COMMON}:
        data = random.Random(page).randbytes({PAGE})
    elif page < {COMMON + ZEROS}:
        data = bytes({PAGE})
    else:
        data = os.urandom({PAGE}) if page < {COMMON + ZEROS + OWN} else twin
    held[page * {PAGE} : (page + 1) * {PAGE}] = data
child = os.fork() if sys.argv[1:] == ["fork"] else -1
if child:
    print(ctypes.addressof(ctypes.c_char.from_buffer(held)), child, flush=True)
sys.stdin.read()
"""


class Holder:
    """A process that runs HOLDER."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.address, self.child = map(int, self._process.stdout.readline().split())

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def mapping(self, pid: int | None = None) -> memory.Mapping:
        """The memory alone, cut out of whatever it was merged with."""
        end = self.address + (COMMON + ZEROS + OWN + TWINS) * PAGE
        return memory.Mapping(pid or self.pid, "holder", "[anon]", self.address, end)


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started = [Holder() for _ in range(3)]
    yield started
    for holder in started:
        holder.end()


def kinds(pages: memory.Pages) -> list[int]:
    """How many pages there are of each kind."""
    found = compare.compare(pages).kinds
    return [int(np.count_nonzero(found == kind)) for kind in Kind]


@pytest.mark.needs("root")
def test_known_memory(holders: list[Holder]) -> None:
    pages = memory.read([holder.mapping() for holder in holders])
    assert kinds(pages) == [3 * OWN, 3 * ZEROS, 3 * TWINS, 3 * COMMON, 0]
    report = compare.report(pages, compare.compare(pages))
    saved = 2 * COMMON + 3 * ZEROS + 3 * (TWINS - 1)
    assert report.total.saved == saved * PAGE
    # twins follow one page, so each is a run of its own
    assert report.runs == {1: 3 * (TWINS - 1), 256: 2 * COMMON}
    assert report.in_runs_of(64) == 2 * COMMON * PAGE
    assert [row.counts.saved // PAGE for row in report.mappings] == [
        COMMON + ZEROS + TWINS - 1,
        COMMON + ZEROS + TWINS - 1,
        ZEROS + TWINS - 1,
    ]
    assert report.frames_known and not report.changed


@pytest.mark.needs("root")
def test_what_a_fork_shares_already_is_not_saved_again() -> None:
    holder = Holder("fork")
    try:
        pages = memory.read([holder.mapping(), holder.mapping(holder.child)])
        everything = COMMON + ZEROS + OWN + TWINS
        assert kinds(pages) == [COMMON + OWN, ZEROS, TWINS, 0, everything]
    finally:
        holder.end()


def test_pages_that_go_meanwhile_are_left_out(holders: list[Holder]) -> None:
    """Memory behind the mapping's end was never there: reading stops there, and goes on."""
    mapping = holders[0].mapping()
    longer = memory.Mapping(mapping.pid, "holder", "[anon]", mapping.start, mapping.end + PAGE)
    reader = memory._Reader(None)
    wanted = np.array([0, 1, 2, (mapping.end - mapping.start) // PAGE + 100_000, 4, 5, 9])
    assert reader._read_pages(longer, wanted).tolist() == [0, 1, 2, 4, 5, 9]


def test_many_scattered_pages_are_read_right(holders: list[Holder]) -> None:
    """More runs than one call takes."""
    reader = memory._Reader(None)
    wanted = np.arange(0, 300, 2).repeat(1)
    many = np.concatenate([wanted] * 10)
    got = reader._read_pages(holders[0].mapping(), many)
    assert got.tolist() == many.tolist()
    assert (reader._buffer[: wanted.size] == reader._buffer[wanted.size : 2 * wanted.size]).all()


def test_a_process_that_ended_is_left_out(holders: list[Holder]) -> None:
    mappings = [holder.mapping() for holder in holders]
    holders[1].end()
    pages = memory.read(mappings)
    assert {mapping.pid for mapping in pages.mappings} == {holders[0].pid, holders[2].pid}


def test_a_limit(holders: list[Holder]) -> None:
    pages = memory.read([holder.mapping() for holder in holders], limit_pages=500)
    assert len(pages.mapping) == 500


def pids(holders: list[Holder]) -> list[str]:
    return [word for holder in holders for word in ("--pid", str(holder.pid))]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command_with_a_picture(holders: list[Holder], tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"out.{suffix}"
    done = samepage("scan", *pids(holders), "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["processes"] == 3
    assert report["total"]["same_host"] >= 3 * COMMON
    assert report["runs"]["256"] == 2 * COMMON
    assert report["total"]["saved"] >= (2 * COMMON + 3 * ZEROS) * PAGE
    if suffix == "png":
        pixels = image.imread(picture)[:, :, :3].reshape(-1, 3).round(2)
        colours = {tuple(colour) for colour in pixels.astype(float).round(2).tolist()}
        assert {(0.0, 0.45, 0.7), (0.0, 0.62, 0.45), (0.73, 0.73, 0.73)} <= colours
    else:
        drawn = picture.read_text().lower()
        assert all(colour in drawn for colour in ("#0072b2", "#009e73", "#bbbbbb"))


def test_command_for_people(holders: list[Holder]) -> None:
    done = samepage("scan", *pids(holders))
    assert done.returncode == 0, done.stderr
    assert "equal to other processes'" in done.stdout
    assert "[anon]" in done.stdout
    assert "256-511" in done.stdout
    assert "Sharing would save" in done.stdout


def test_control_groups(holders: list[Holder], tmp_path: Path) -> None:
    """A directory as the kernel shows it, with one group below another."""
    (tmp_path / "below").mkdir()
    (tmp_path / "cgroup.procs").write_text(f"{holders[0].pid}\n")
    (tmp_path / "below" / "cgroup.procs").write_text(f"{holders[1].pid}\n{holders[2].pid}\n")
    assert memory.processes_of_cgroup(tmp_path) == sorted(holder.pid for holder in holders)
    done = samepage("scan", "--cgroup", tmp_path, "--json")
    assert json.loads(done.stdout)["processes"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--pid", "4194304"], 1, "no process 4194304"),
        (["--cgroup", "/nowhere"], 1, "no control group"),
        (["--match", "("], 2, "no pattern"),
        (["--match", "no such process runs here, surely"], 1, "nothing matches"),
        (["--pid", "1", "--plot", "out.pdf"], 2, ".png or .svg"),
        (["--pid", "1", "--limit", "much"], 2, "is no size"),
        (["--files"], 2, "are for processes"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, told: str) -> None:
    done = samepage("scan", *arguments)
    assert done.returncode == code
    assert told in done.stderr.replace("\n", " ")


WITHOUT_RIGHTS = """
import os, sys
from samepage.errors import SamepageError
from samepage.scan import memory
os.setuid(65534)
try:
    memory.mappings(int(sys.argv[1]))
except SamepageError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.needs("root")
def test_without_rights(holders: list[Holder]) -> None:
    command = [sys.executable, "-c", WITHOUT_RIGHTS, str(holders[0].pid)]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    assert told.startswith("DeniedError")
    assert "CAP_SYS_PTRACE" in told


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    with running(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")
def test_arenas_are_estimated_and_not_changed(up: Up) -> None:
    hour = ("interval_seconds=3600", "interval_max_seconds=3600")  # no background pass meanwhile
    assert samepage("policy", *hour, "--dir", up.directory).returncode == 0
    with contextlib.ExitStack() as stack:
        applications = [stack.enter_context(Application(up.host())) for _ in range(2)]
        for number, application in enumerate(applications):
            application.call("create", f"arena-{number}", 1000)
            application.call("fill", f"arena-{number}", 1, 0, 800)
            application.call("fill", f"arena-{number}", 100 + number, 800, 100)

        def looked_at() -> list[dict[str, Any]]:
            done = samepage("scan", "--dir", up.directory, "--json")
            assert done.returncode == 0, done.stderr
            domains: list[dict[str, Any]] = json.loads(done.stdout)[0]["domains"]
            return domains

        [domain] = looked_at()
        [first, second] = domain["arenas"]
        assert sorted((first["duplicate"], second["duplicate"])) == [0, 800]
        assert domain["runs"] == {"512": 800}
        assert_the_picture_shows_where(up)
        assert {arena["absent"] for arena in domain["arenas"]} == {100}
        assert {
            application.call("stats", f"arena-{n}")["shared"]
            for n, application in enumerate(applications)
        } == {0}
        applications[0].call("share", "arena-0")
        [domain] = looked_at()
        assert [arena["shared"] for arena in domain["arenas"]] == [800, 800]
        assert [arena["duplicate"] for arena in domain["arenas"]] == [0, 0]
        assert [arena["kept"] for arena in domain["arenas"]] == [100, 100]
        assert samepage("scan", "--dir", up.directory).returncode == 0


@pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")
def test_duplicates_within_a_process_and_across_the_host(up: Up) -> None:
    """A page that another process has too counts as the host's, wherever its leader is."""
    hour = ("interval_seconds=3600", "interval_max_seconds=3600")  # no background pass meanwhile
    assert samepage("policy", *hour, "--dir", up.directory).returncode == 0
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(Application(up.host())) for _ in range(2))
        for name in ("first", "second"):
            one.call("create", name, 100)
            one.call("fill", name, 1, 0, 40)
            one.call("fill", name, 2, 60, 30)
        other.call("create", "third", 100)
        other.call("fill", "third", 2, 0, 30)
        done = samepage("scan", "--dir", up.directory, "--json")
        [domain] = json.loads(done.stdout)[0]["domains"]
        arenas = domain["arenas"]
        kinds = ("same_process", "same_host", "duplicate")
        assert [sum(arena[kind] for arena in arenas) for kind in kinds] == [40, 60, 100]
        told = samepage("scan", "--dir", up.directory, env={**os.environ, "COLUMNS": "200"})
        assert "same process" in told.stdout and "same host" in told.stdout


def assert_the_picture_shows_where(up: Up) -> None:
    """The first 800 pages of one of two arenas would be shared, the last 100 were never touched."""
    [host] = places.find(up.directory).hosts
    [domain] = daemons.estimate_savings(host, 50)
    by_duplicates = sorted(domain.arenas, key=lambda arena: arena.duplicate)
    for arena, duplicate in zip(by_duplicates, (0, 20), strict=True):
        assert [stretch.pages for stretch in arena.stretches] == [20] * 50
        assert [s.duplicate for s in arena.stretches] == [duplicate] * 40 + [0] * 10
        assert [s.absent for s in arena.stretches] == [0] * 45 + [20] * 5
        assert {s.shared for s in arena.stretches} == {s.zero for s in arena.stretches} == {0}
    for suffix, begins in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        out = up.directory / f"where{suffix}"
        done = samepage("scan", "--dir", up.directory, "--plot", out)
        assert done.returncode == 0 and f"drawn: {out}" in done.stderr
        assert out.read_bytes().startswith(begins)


def test_reading_oneself_is_like_reading_others() -> None:
    """The figures do not depend on who asks."""
    held = np.frombuffer(os.urandom(64 * PAGE), np.uint8).copy()
    mappings = [m for m in memory.mappings(os.getpid()) if m.start <= held.ctypes.data < m.end]
    pages = memory.read(mappings)
    assert len(pages.mapping) >= 64
