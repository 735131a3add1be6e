"""The client against the real library and a small merger that speaks the real protocol."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.lone_merger import LoneMerger

import samepage
from samepage import native
from samepage.daemon.wire import Type

PAGE = 4096


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Path]:
    with LoneMerger(tmp_path):
        yield tmp_path


@pytest.fixture
def node(merger: Path) -> Iterator[samepage.Node]:
    with samepage.connect(merger) as node:
        yield node


def mapped(address: int) -> bool:
    """Whether this process has a mapping at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def address_of(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_an_arena_is_zero_and_can_be_written(node: samepage.Node) -> None:
    with node.create_arena("a", size="1MiB") as arena:
        assert (arena.name, arena.domain, arena.size) == ("a", "default", 2**20)
        view = arena.buffer
        assert view.nbytes == 2**20 and view.format == "B" and not view.readonly
        assert view.tobytes() == bytes(2**20)
        view[4095:4099] = b"text"
        assert arena.buffer[4095:4099].tobytes() == b"text"
        array = np.frombuffer(arena.buffer, np.uint64)
        array[1000] = 7
        assert arena.buffer[8000] == 7


def test_the_size_is_rounded_up_to_pages(node: samepage.Node) -> None:
    with node.create_arena("a", size=PAGE + 1) as arena:
        assert arena.size == len(arena.buffer) == 2 * PAGE


def test_stats_count_pages_as_the_kernel_shows_them(node: samepage.Node) -> None:
    with node.create_arena("a", size=8 * PAGE) as arena:
        arena.buffer[0] = 1
        arena.buffer[5 * PAGE] = 1
        stats = arena.stats()
        assert stats == samepage.ArenaStats(
            pages=8, private=2, shared=0, absent=6, evicted=0, saved_bytes=0
        )


def test_views_outlive_the_arena_and_the_node(merger: Path) -> None:
    with samepage.connect(merger) as node, node.create_arena("a", size="1MiB") as arena:
        view = arena.buffer
        view[:5] = b"hello"
    assert arena.closed and node.closed
    half = view[:PAGE]
    address = address_of(view)
    del view, arena, node
    gc.collect()
    assert half[:5].tobytes() == b"hello"
    half[0] = 0
    assert mapped(address)
    del half
    gc.collect()
    assert not mapped(address)


def test_a_view_alone_keeps_its_arena_open(merger: Path) -> None:
    view = samepage.connect(merger).create_arena("a", size=PAGE).buffer
    gc.collect()
    with samepage.connect(merger) as other, pytest.raises(samepage.NameTakenError):
        other.create_arena("a", size=PAGE)
    assert view[0] == 0


def test_closing_frees_the_name_and_twice_is_fine(node: samepage.Node) -> None:
    arena = node.create_arena("a", size=PAGE)
    with pytest.raises(samepage.NameTakenError, match="'a' is taken"):
        node.create_arena("a", size=PAGE)
    arena.close()
    arena.close()
    node.create_arena("a", size=PAGE).close()


def test_the_same_name_in_another_domain_is_free(node: samepage.Node) -> None:
    with (
        node.create_arena("a", size=PAGE),
        node.create_arena("a", size=PAGE, domain="team-b") as other,
    ):
        assert other.domain == "team-b"


@pytest.mark.parametrize(
    "use",
    [
        lambda arena: arena.buffer,
        lambda arena: arena.stats(),
        lambda arena: arena.share(),
        lambda arena: arena.unshare(),
    ],
    ids=["buffer", "stats", "share", "unshare"],
)
def test_a_closed_arena_refuses(
    node: samepage.Node, use: Callable[[samepage.Arena], object]
) -> None:
    arena = node.create_arena("a", size=PAGE)
    arena.close()
    with pytest.raises(samepage.ClosedError, match="'a' is closed"):
        use(arena)


def test_a_closed_node_refuses_and_closes_its_arenas(merger: Path) -> None:
    node = samepage.connect(merger)
    arena = node.create_arena("a", size=PAGE)
    node.close()
    node.close()
    with pytest.raises(samepage.ClosedError):
        node.create_arena("b", size=PAGE)
    with pytest.raises(samepage.ClosedError):
        node.arenas()
    with pytest.raises(samepage.ClosedError):
        arena.stats()
    arena.close()


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "a\0b", "x" * 128, "\ud800"])
def test_bad_names_are_refused(node: samepage.Node, name: str) -> None:
    with pytest.raises(samepage.InvalidArgumentError, match="name"):
        node.create_arena(name, size=PAGE)


@pytest.mark.parametrize("domain", ["", "A", "-a", "a.", "x" * 64, "ä"])
def test_bad_domains_are_refused(node: samepage.Node, domain: str) -> None:
    with pytest.raises(samepage.InvalidArgumentError, match="domain"):
        node.create_arena("a", size=PAGE, domain=domain)


@pytest.mark.parametrize("size", [2**47 + PAGE, 2**70, "100TiB"])
def test_nothing_is_mapped_for_what_cannot_fit(node: samepage.Node, size: int | str) -> None:
    before = len(Path("/proc/self/maps").read_text().splitlines())
    with pytest.raises(samepage.OutOfMemoryError, match="ask for less"):
        node.create_arena("a", size=size)
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= before


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), "soon", True])
def test_bad_timeouts_are_refused(node: samepage.Node, timeout: float) -> None:
    with (
        node.create_arena("a", size=PAGE) as arena,
        pytest.raises(samepage.InvalidArgumentError, match="timeout"),
    ):
        arena.share(timeout=timeout)


def test_share_without_a_scanner_says_so(node: samepage.Node) -> None:
    with (
        node.create_arena("a", size=PAGE) as arena,
        pytest.raises(samepage.ServiceUnavailableError, match="scanner"),
    ):
        arena.share(timeout=1.0)


def test_no_merger(tmp_path: Path) -> None:
    with pytest.raises(samepage.NotRunningError, match="SAMEPAGE_DIR"):
        samepage.connect(tmp_path)


def test_a_merger_that_was_killed_left_its_socket(tmp_path: Path) -> None:
    with LoneMerger(tmp_path):
        pass
    assert (tmp_path / "merger.sock").exists()
    with pytest.raises(samepage.NotRunningError):
        samepage.connect(tmp_path)


def test_a_path_too_long_for_a_socket() -> None:
    with pytest.raises(samepage.InvalidArgumentError, match="too long"):
        samepage.connect("/" + "x" * 200)


def test_an_arena_that_was_not_made_is_not_announced_later(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with LoneMerger(tmp_path, dies_of=Type.ARENA_OPEN):
            node = stack.enter_context(samepage.connect(tmp_path))
            with pytest.raises(samepage.ServiceUnavailableError):
                node.create_arena("a", 4096)
        (tmp_path / "merger.sock").unlink()
        with LoneMerger(tmp_path) as merger:
            made = None
            while made is None:
                with contextlib.suppress(samepage.ServiceUnavailableError):
                    made = node.create_arena("b", 4096)
            assert merger.opened == ["b"]
            made.close()


def test_a_merger_one_protocol_version_back(tmp_path: Path) -> None:
    with (
        LoneMerger(tmp_path, version=2),
        samepage.connect(tmp_path) as node,
        node.create_arena("a", 4096) as arena,
    ):
        arena.buffer[:4] = b"data"
        assert arena.stats().private == 1


@pytest.mark.parametrize(("version", "who"), [(1, "daemon"), (4, "library")])
def test_no_protocol_version_in_common(tmp_path: Path, version: int, who: str) -> None:
    with (
        LoneMerger(tmp_path, version=version),
        pytest.raises(samepage.ProtocolVersionError, match=f"2 to 3: upgrade the {who}"),
    ):
        samepage.connect(tmp_path)


def test_a_merger_that_does_not_answer(tmp_path: Path) -> None:
    with (
        LoneMerger(tmp_path, silent=True),
        pytest.raises(samepage.ServiceUnavailableError, match="did not answer"),
    ):
        samepage.connect(tmp_path)


def test_the_directory_comes_from_the_environment(
    merger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMEPAGE_DIR", str(merger))
    with samepage.connect() as node:
        assert node.dir == str(merger)


def test_operators_calls_need_the_api_socket(node: samepage.Node) -> None:
    with pytest.raises(samepage.NotRunningError, match=r"merger-api\.sock"):
        node.arenas()
    with pytest.raises(samepage.NotRunningError, match=r"merger-api\.sock"):
        node.stats()


def test_every_method_refuses_in_a_forked_child(node: samepage.Node) -> None:
    with node.create_arena("a", size=PAGE) as arena:
        arena.buffer[0] = 1
        child = os.fork()
        if child == 0:
            os._exit(_refusals(node, arena) ^ 0b1111111)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert arena.buffer[0] == 1
        assert arena.stats().private == 1


def _refusals(node: samepage.Node, arena: samepage.Arena) -> int:
    """In a child: one bit for each call that raises ForkedError."""
    calls: list[Callable[[], object]] = [
        lambda: node.create_arena("b", size=PAGE),
        node.close,
        lambda: arena.buffer,
        arena.stats,
        arena.share,
        arena.unshare,
        arena.close,
    ]
    bits = 0
    for number, call in enumerate(calls):
        try:
            call()
        except samepage.ForkedError:
            bits |= 1 << number
    return bits


_FORKS = """
import multiprocessing, sys
import samepage

def work():
    with samepage.connect(sys.argv[1]) as node, node.create_arena("child", size=4096) as arena:
        arena.buffer[0] = 2
        sys.exit(arena.buffer[0])

node = samepage.connect(sys.argv[1])
arena = node.create_arena("parent", size=4096)
arena.buffer[0] = 1
child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
sys.exit(child.exitcode * 10 + arena.buffer[0])
"""


def test_a_child_may_connect_anew(merger: Path) -> None:
    """And neither process has trouble at its exit, with arenas that nobody closed."""
    done = subprocess.run([sys.executable, "-c", _FORKS, merger], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (21, "")


def test_threads_may_use_a_node_together(node: samepage.Node) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                with node.create_arena(f"{number}-{turn}", size=4 * PAGE) as arena:
                    arena.buffer[0] = number
                    assert arena.stats().private == 1
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_importing_the_client_needs_neither_grpc_nor_numpy() -> None:
    code = "import sys, samepage; print([m for m in ('grpc', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_errnos_are_samepage_errors() -> None:
    with pytest.raises(samepage.SamepageError) as raised:
        native._check(-99)
    assert type(raised.value) is samepage.SamepageError
