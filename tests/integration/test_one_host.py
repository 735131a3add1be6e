"""One host, end to end: real processes, a real cluster, and what the kernel says of it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.up import Up, running
from helpers.waiting import wait_until

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PRIVATE, SHARED, ABSENT = 4, 5, 0
PAGES = 600


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster")) as up:
        yield up


@pytest.fixture
def pair(cluster: Up) -> Iterator[tuple[Application, Application]]:
    """Two applications with an arena `a` or `b` each, of the same bytes."""
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application, name in ((one, "a"), (two, "b")):
            application.call("create", name, PAGES)
            application.call("fill", name, 1)
        yield one, two


def digest(seed: int, pages: int = PAGES) -> str:
    return hashlib.sha256(content(seed, pages)).hexdigest()


def test_equal_pages_become_one(pair: tuple[Application, Application]) -> None:
    one, two = pair
    report = two.call("share", "b")
    assert report["merged"] == report["shared"] == report["pages"] == PAGES
    for application, name in ((one, "a"), (two, "b")):
        assert application.call("pagemap", name) == [SHARED] * PAGES
        assert application.call("digest", name) == digest(1)
        stats = application.call("stats", name)
        assert stats["shared"] == PAGES and stats["private"] == stats["absent"] == 0
        assert stats["saved_bytes"] == PAGES * PAGE // 2
    # the same slots, in the same order, as one mapping
    assert one.call("mappings", "a") == two.call("mappings", "b")
    assert len(one.call("mappings", "a")) == 1


def test_kernel_reports_the_memory_as_saved(cluster: Up) -> None:
    pages = 8192
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application, name in ((one, "a"), (two, "b")):
            application.call("create", name, pages)
            application.call("fill", name, 2)
        before = pss(one.pid) + pss(two.pid)
        one.call("share", "a")
        # Pss counts each page of the store among those that map it, so once in the sum
        saved = before - pss(one.pid) - pss(two.pid)
        assert saved > pages * PAGE * 0.95


def pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


def test_write_changes_one_process_alone(pair: tuple[Application, Application]) -> None:
    one, two = pair
    two.call("share", "b")
    one.call("write", "a", 5 * PAGE + 100, "beef")
    assert one.call("read", "a", 5 * PAGE + 99, 4) == (
        content(1, PAGES)[5 * PAGE + 99 : 5 * PAGE + 100].hex()
        + "beef"
        + content(1, PAGES)[5 * PAGE + 102 : 5 * PAGE + 103].hex()
    )
    assert two.call("digest", "b") == digest(1)
    states = one.call("pagemap", "a")
    assert states[5] == PRIVATE and states.count(SHARED) == PAGES - 1
    assert two.call("pagemap", "b") == [SHARED] * PAGES


def test_counting_while_pages_come_and_go(cluster: Up) -> None:
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application in (one, two):
            application.call("create", f"counters-{application.pid}", 256)
            application.call("fill", f"counters-{application.pid}", 6)
        for application in (one, two):
            application.start("hammer", f"counters-{application.pid}", 5000)
        for application in (one, two):
            lost, merged = application.finish()
            assert lost == []
            assert merged > 0


def test_same_bytes_again_merge_again(pair: tuple[Application, Application]) -> None:
    one, two = pair
    two.call("share", "b")
    one.call("fill", "a", 9, 100, 200)
    states = one.call("pagemap", "a")
    assert states[100:300] == [PRIVATE] * 200
    assert states[:100] == [SHARED] * 100  # what is restored ahead lies ahead
    one.call("write", "a", 100 * PAGE, content(1, PAGES)[100 * PAGE : 300 * PAGE].hex())
    report = one.call("share", "a")
    assert report["merged"] >= 200 and report["shared"] == PAGES
    # First of all the bytes. A background pass may just have a page out of the page table, and so
    # may the kernel's reclaim (DAMON's pageout), where a store's page stood still: reading helps.
    assert one.call("digest", "a") == two.call("digest", "b") == digest(1)
    wait_until(lambda: one.call("pagemap", "a") == [SHARED] * PAGES)


def test_unshare_makes_every_page_private(pair: tuple[Application, Application]) -> None:
    one, two = pair
    two.call("share", "b")
    one.call("unshare", "a")
    assert one.call("pagemap", "a") == [PRIVATE] * PAGES
    assert all(inode == 0 for _, _, inode, _ in one.call("mappings", "a"))
    assert one.call("digest", "a") == digest(1)
    assert two.call("pagemap", "b") == [SHARED] * PAGES


def test_unshare_with_no_mapping_left_keeps_every_byte(
    pair: tuple[Application, Application],
) -> None:
    one, two = pair
    two.call("share", "b")
    one.call("unshare_without_memory", "a")
    assert one.call("stats", "a")["shared"] == 0
    two.call("unshare", "b")  # and the slots are freed
    for application, name in ((one, "a"), (two, "b")):
        assert application.call("digest", name) == digest(1)
    one.call("write", "a", 0, "00")
    assert two.call("digest", "b") == digest(1)


def test_share_right_after_connecting(cluster: Up) -> None:
    for _ in range(20):
        with Application(cluster.host()) as one:
            one.call("create", "eager", 1)
            one.call("share", "eager")


def test_views_outlive_close_and_disconnect(pair: tuple[Application, Application]) -> None:
    one, two = pair
    two.call("share", "b")
    one.call("close", "a", True)
    assert one.call("pagemap", "a") == [PRIVATE] * PAGES
    assert one.call("digest", "a") == digest(1)
    two.call("disconnect")
    assert two.call("pagemap", "b") == [PRIVATE] * PAGES
    two.call("write", "b", 0, "00")
    assert two.call("digest", "b") != digest(1)


def test_name_is_free_again_after_close(pair: tuple[Application, Application]) -> None:
    one, two = pair
    with pytest.raises(ApplicationError, match="NameTakenError"):
        two.call("create", "a", 1)
    one.call("close", "a")
    two.call("create", "a", 1)


def test_name_is_free_again_after_the_process(cluster: Up) -> None:
    with Application(cluster.host()) as one:
        one.call("create", "brief", 10)
        one.process.kill()
        one.process.wait()
    with Application(cluster.host()) as two:
        two.call("create", "brief", 10)


def test_pages_of_two_domains_never_share(cluster: Up) -> None:
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application, domain in ((one, "red"), (two, "blue")):
            for name in ("a", "b"):
                application.call("create", name, PAGES, domain)
                application.call("fill", name, 1)
        for application in (one, two):
            assert application.call("share", "a")["merged"] == PAGES
        inodes = []
        for application in (one, two):
            found = {
                inode for name in "ab" for _, _, inode, _ in application.call("mappings", name)
            }
            assert len(found) == 1 and 0 not in found
            inodes.append(found)
        assert inodes[0].isdisjoint(inodes[1])


def test_arena_equal_to_itself(cluster: Up) -> None:
    with Application(cluster.host()) as one:
        one.call("create", "twice", 512)
        one.call("fill", "twice", 4, 0, 256)
        one.call("fill", "twice", 4, 256, 256)
        report = one.call("share", "twice")
        assert report["shared"] == 512
        (_, _, inode, first), (_, _, _, second) = one.call("mappings", "twice")
        assert inode != 0 and first == second
        assert one.call("digest", "twice") == hashlib.sha256(content(4, 256) * 2).hexdigest()


def test_zero_pages_go_back_to_the_kernel(cluster: Up) -> None:
    with Application(cluster.host()) as one:
        one.call("create", "zeros", 64)
        one.call("write", "zeros", 0, "00" * (32 * PAGE))
        report = one.call("share", "zeros")
        assert report["merged"] == 32 and report["absent"] == 32
        assert one.call("pagemap", "zeros") == [ABSENT] * 64
        assert one.call("read", "zeros", 31 * PAGE, 8) == "00" * 8


def test_fork_leaves_the_arena_with_the_parent(pair: tuple[Application, Application]) -> None:
    one, two = pair
    two.call("share", "b")
    answers = one.call("fork", "a")
    assert answers == {
        "share": "ForkedError",
        "stats": "ForkedError",
        "unshare": "ForkedError",
        "close": "ForkedError",
        "new": "1",
        "status": "0",
    }
    assert one.call("read", "a", 0, 3) == "c0ffee"
    assert two.call("digest", "b") == digest(1)
    one.call("write", "a", 0, content(1, PAGES)[:3].hex())
    assert one.call("share", "a")["shared"] == PAGES


def test_application_needs_no_privilege(cluster: Up) -> None:
    for directory in (cluster.host(), *cluster.host().parents):
        os.chmod(directory, directory.stat().st_mode | 0o011)
    with Application(cluster.host(), user=65534) as one, Application(cluster.host()) as two:
        for application, name in ((one, "a"), (two, "b")):
            application.call("create", name, PAGES)
            application.call("fill", name, 1)
        assert one.call("identity") == [65534, 0]
        assert one.call("share", "a")["merged"] == PAGES
        assert one.call("pagemap", "a") == two.call("pagemap", "b") == [SHARED] * PAGES
        one.call("write", "a", 0, "ff")
        assert two.call("digest", "b") == digest(1)


@pytest.mark.needs("gcc")
@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"])
def test_c_and_python_share(cluster: Up, tmp_path: Path, sanitize: str) -> None:
    native = Path(__file__).parents[2] / "native"
    subprocess.run(
        ["make", "-s", "-C", native, "all", "examples", f"SANITIZE={sanitize}"], check=True
    )
    file = tmp_path / "data"
    file.write_bytes(content(7, PAGES))
    with Application(cluster.host()) as python:
        python.call("create", "python", PAGES)
        python.call("fill", "python", 7)
        with subprocess.Popen(
            [native / "build" / sanitize.replace(",", "-") / "examples/share", file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "SAMEPAGE_DIR": str(cluster.host()),
                "TSAN_OPTIONS": f"suppressions={native}/tests/tsan.supp",
            },
        ) as c:
            assert c.stdout is not None
            assert f'"merged": {PAGES}' in c.stdout.readline()
            assert python.call("pagemap", "python") == [SHARED] * PAGES
            python.call("write", "python", 0, "11")
        assert c.returncode == 0


def test_no_descriptor_or_mapping_is_left(cluster: Up) -> None:
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        two.call("create", "peer", 64)
        two.call("fill", "peer", 3)

        def come_and_go() -> int:
            one.call("create", "brief", 64)
            one.call("fill", "brief", 3)
            assert one.call("share", "brief")["shared"] == 64
            one.call("close", "brief")
            descriptors: int = one.call("descriptors")
            return descriptors

        first = come_and_go()
        mappings = len(Path(f"/proc/{one.pid}/maps").read_text().splitlines())
        for _ in range(20):
            assert come_and_go() == first
        assert len(Path(f"/proc/{one.pid}/maps").read_text().splitlines()) <= mappings + 2


@pytest.mark.parametrize(
    ("name", "pages", "domain", "kind", "says"),
    [
        ("", 1, None, "InvalidArgumentError", "name"),
        ("a/b", 1, None, "InvalidArgumentError", "'/'"),
        ("a\nb", 1, None, "InvalidArgumentError", "control"),
        ("n" * 128, 1, None, "InvalidArgumentError", "127"),
        ("n", 0, None, "InvalidArgumentError", "size"),
        ("n", -1, None, "InvalidArgumentError", "size"),
        ("n", 1 << 30, None, "OutOfMemoryError", "memory"),
        ("n", 1 << 40, None, "OutOfMemoryError", "address space"),
        ("n", 1, "Red", "InvalidArgumentError", "domain"),
        ("n", 1, "-red", "InvalidArgumentError", "domain"),
    ],
)
def test_bad_arena(
    cluster: Up, name: str, pages: int, domain: str | None, kind: str, says: str
) -> None:
    with Application(cluster.host()) as one:
        with pytest.raises(ApplicationError, match=says) as caught:
            one.call("create", name, pages, domain)
        assert caught.value.kind == kind
        one.call("create", "good", 1)


@pytest.mark.parametrize("missing", ["userfaultfd", "move", "wp_tmpfs"])
def test_kernel_that_lacks_a_feature(cluster: Up, missing: str) -> None:
    with Application(cluster.host(), env={"SAMEPAGE_DISABLE": missing}) as one:
        one.call("create", "plain", 16)
        one.call("fill", "plain", 5, 0, 8)
        one.call("fill", "plain", 5, 8, 8)
        try:
            report = one.call("share", "plain")
            assert report["merged"] == 0 and report["unsupported"] > 0
        except ApplicationError as error:
            assert error.kind == "UnsupportedKernelError" and missing in str(error)
        assert one.call("pagemap", "plain") == [PRIVATE] * 16
        assert one.call("digest", "plain") == hashlib.sha256(content(5, 8) * 2).hexdigest()


def test_no_merger_at_the_socket(tmp_path: Path) -> None:
    with Application(tmp_path) as one, pytest.raises(ApplicationError) as caught:
        one.call("create", "a", 1)
    assert caught.value.kind == "NotRunningError"
    assert "SAMEPAGE_DIR" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_stopped_process_does_not_hold_up_a_share(
    cluster: Up, pair: tuple[Application, Application]
) -> None:
    """The others' pages are merged; those of the stopped one are when it goes on."""
    one, _ = pair
    with Application(cluster.host()) as stopped:
        stopped.call("create", "stopped", PAGES)
        stopped.call("fill", "stopped", 1)
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            assert one.call("share", "a", 4.0)["shared"] == PAGES
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.call("share", "stopped")["merged"] == PAGES
