"""What the kernel tests of its own page merging, done with arenas; see docs/testing.md."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from application import PAGE, Application, content
from helpers.up import Up, running, samepage
from helpers.waiting import wait_until

from samepage.v1 import merger_pb2, merger_pb2_grpc

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

MADV_HUGEPAGE = 14
HUGE_PAGES = 512  # pages in a huge page
SHARED = 5  # bits 63 and 61 of a page map entry: present, and the store's


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("scenarios") / "cluster") as up:
        yield up


def status(cluster: Up) -> merger_pb2.GetMergerStatusResponse:
    with grpc.insecure_channel(f"unix:{cluster.host()}/merger-api.sock") as channel:
        return merger_pb2_grpc.MergerStub(channel).GetMergerStatus(
            merger_pb2.GetMergerStatusRequest()
        )


@pytest.mark.parametrize(("processes", "pages"), [(2, 1), (3, 100), (8, 300)])
def test_exact_counts_for_n_duplicates(cluster: Up, processes: int, pages: int) -> None:
    """N processes with the same M pages: M slots, N x M references, whatever N is."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(Application(cluster.host())) for _ in range(processes)]
        for number, application in enumerate(started):
            application.call("create", f"n-{number}", pages)
            application.call("fill", f"n-{number}", 3)
        assert started[0].call("share", "n-0")["shared"] == pages
        found = status(cluster)
        assert (found.slots, found.shared_pages) == (pages, processes * pages)
        assert found.saved_bytes == (processes - 1) * pages * PAGE
        assert found.store_bytes == pages * PAGE
        # one after the other goes, and the books follow exactly
        for number, application in enumerate(started[:-1]):
            application.call("close", f"n-{number}")
            assert started[-1].call("stats", f"n-{processes - 1}")["shared"] == pages
        found = status(cluster)
        assert (found.slots, found.shared_pages) == (pages, pages)


def test_one_page_many_times_in_one_arena(cluster: Up) -> None:
    """No cap on the sharers of a slot, unless one is set."""
    with Application(cluster.host()) as application:
        application.call("create", "many", 2000)
        for page in range(2000):
            application.call("fill", "many", 5, page, 1)
        assert application.call("share", "many")["shared"] == 2000
        found = status(cluster)
        assert (found.slots, found.shared_pages) == (1, 2000)
        application.call("write", "many", 1000 * PAGE, "ff")
        assert application.call("stats", "many")["shared"] == 1999
        application.call("unshare", "many")
        assert application.call("stats", "many")["private"] == 2000


@pytest.fixture
def capped(cluster: Up) -> Iterator[Callable[[int], None]]:
    """Sets the cap on sharers of a slot; there is none afterwards."""

    def cap(sharers: int) -> None:
        done = samepage("policy", f"sharers_max={sharers}", "--dir", cluster.directory)
        assert done.returncode == 0, done.stderr

    yield cap
    cap(0)


def sharers(*applications: tuple[Application, str]) -> list[int]:
    """How many pages of arenas map each slot, by what the kernel says of their processes."""
    counts: Counter[int] = Counter()
    for application, arena in applications:
        assert set(application.call("pagemap", arena)) == {SHARED}
        for _, pages, _, slot in application.call("mappings", arena):
            counts.update(range(slot, slot + pages))
    return sorted(counts.values(), reverse=True)


@pytest.mark.parametrize(("pages", "cap"), [(2000, 256), (500, 2), (600, 300), (100, 1000)])
def test_one_page_many_times_with_a_cap(
    cluster: Up, capped: Callable[[int], None], pages: int, cap: int
) -> None:
    """N equal pages in one arena are on ceil(N / cap) slots, all full but the last."""
    capped(cap)
    with Application(cluster.host()) as application:
        application.call("create", "many", pages)
        for page in range(pages):
            application.call("fill", "many", 5, page, 1)
        assert application.call("share", "many")["shared"] == pages
        found = status(cluster)
        assert (found.slots, found.shared_pages) == (-(-pages // cap), pages)
        full, rest = divmod(pages, cap)
        assert sharers((application, "many")) == [cap] * full + [rest] * bool(rest)
        expected = hashlib.sha256(content(5, 1) * pages).hexdigest()
        assert application.call("digest", "many") == expected
        application.call("unshare", "many")
        wait_until(lambda: status(cluster).slots == 0)


def test_a_cap_over_several_processes(cluster: Up, capped: Callable[[int], None]) -> None:
    """N processes with the same M pages: M x ceil(N / cap) slots, also as they come one by one."""
    processes, pages, cap = 7, 200, 3
    capped(cap)
    with contextlib.ExitStack() as stack:
        held: list[tuple[Application, str]] = []
        for number in range(processes):
            application = stack.enter_context(Application(cluster.host()))
            application.call("create", f"n-{number}", pages)
            application.call("fill", f"n-{number}", 3)
            held.append((application, f"n-{number}"))
            if number < 4:  # the others come together
                continue
            assert application.call("share", f"n-{number}")["shared"] == pages
            found = status(cluster)
            assert found.slots == -(-(number + 1) // cap) * pages
            assert found.shared_pages == (number + 1) * pages
        assert sharers(*held) == [3] * 2 * pages + [1] * pages
        capped(0)
        application = stack.enter_context(Application(cluster.host()))
        application.call("create", "late", pages)
        application.call("fill", "late", 3)
        assert application.call("share", "late")["shared"] == pages
        assert status(cluster).slots == 3 * pages
        expected = hashlib.sha256(content(3, pages)).hexdigest()
        assert {application.call("digest", arena) for application, arena in held} == {expected}


@pytest.mark.needs("thp")
def test_transparent_huge_pages(cluster: Up) -> None:
    """They are split, and share as any page."""
    pages = 4 * HUGE_PAGES
    with Application(cluster.host()) as one, Application(cluster.host()) as other:
        for number, application in enumerate((one, other)):
            application.call("create", f"huge-{number}", pages)
            application.call("system", "madvise", f"huge-{number}", 0, pages, MADV_HUGEPAGE)
            application.call("fill", f"huge-{number}", 4)
        assert any("AnonHugePages:" in line and " 0 kB" not in line for line in smaps(one))
        assert one.call("share", "huge-0")["shared"] == pages
        expected = hashlib.sha256(content(4, pages)).hexdigest()
        for number, application in enumerate((one, other)):
            assert application.call("digest", f"huge-{number}") == expected
            assert application.call("pagemap", f"huge-{number}") == [SHARED] * pages


def smaps(application: Application) -> list[str]:
    return Path(f"/proc/{application.pid}/smaps").read_text().splitlines()


def test_locked_pages_stay_in_their_process(cluster: Up) -> None:
    """mlock() is a promise about the page itself: it is not taken away until it is unlocked."""
    with Application(cluster.host()) as one, Application(cluster.host()) as other:
        for number, application in enumerate((one, other)):
            application.call("create", f"locked-{number}", 64)
            application.call("fill", f"locked-{number}", 6)
        one.call("system", "mlock", "locked-0", 0, 32)
        report = one.call("share", "locked-0")
        assert (report["shared"], report["unsupported"]) == (32, 32)
        assert one.call("pagemap", "locked-0").count(SHARED) == 32
        assert one.call("digest", "locked-0") == hashlib.sha256(content(6, 64)).hexdigest()
        one.call("system", "munlock", "locked-0", 0, 32)
        assert one.call("share", "locked-0")["shared"] == 64


def test_a_child_that_writes_its_own_memory_changes_nothing(cluster: Up) -> None:
    """The arena stays with the parent, who writes shared pages while the child lives."""
    with Application(cluster.host()) as one, Application(cluster.host()) as other:
        for number, application in enumerate((one, other)):
            application.call("create", f"forked-{number}", 64)
            application.call("fill", f"forked-{number}", 8)
        assert one.call("share", "forked-0")["shared"] == 64
        one.call("write_beside_a_child", "forked-0", 0, "c0ffee")
        assert one.call("read", "forked-0", 0, 3) == "c0ffee"
        assert other.call("digest", "forked-1") == hashlib.sha256(content(8, 64)).hexdigest()
        one.call("fill", "forked-0", 8)
        assert one.call("share", "forked-0")["shared"] == 64


def test_mappings_that_change_under_a_running_swap(cluster: Up) -> None:
    """mprotect(), madvise() and mmap() of parts of an arena while it is shared in a loop."""
    with Application(cluster.host()) as one, Application(cluster.host()) as other:
        for number, application in enumerate((one, other)):
            application.call("create", f"moving-{number}", 512)
            application.call("fill", f"moving-{number}", 9)
        assert one.call("change_while_shared", "moving-0", 9, 150) == []
        assert other.call("digest", "moving-1") == hashlib.sha256(content(9, 512)).hexdigest()
        one.call("unshare", "moving-0")
        assert one.call("stats", "moving-0")["shared"] == 0
