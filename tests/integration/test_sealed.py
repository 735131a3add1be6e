"""Sealed arenas: read-only, and shared even where the kernel has no userfaultfd."""

from __future__ import annotations

import contextlib
import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.up import Up, running

pytestmark = pytest.mark.needs("root")

PAGES = 600
SHARED = 5  # bits 63 and 61 of a page map entry: present, and the store's
NOTHING = "userfaultfd,move,wp_tmpfs,remap,poison,pagemap_scan"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("sealed") / "cluster") as cluster:
        yield cluster


@pytest.fixture(params=["", NOTHING], ids=["with userfaultfd", "without"])
def applications(up: Up, request: pytest.FixtureRequest) -> Iterator[list[Application]]:
    """Two processes with an arena of the same bytes each; zeros at the end."""
    env = {"SAMEPAGE_DISABLE": request.param} if request.param else {}
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(Application(up.host(), env=env)) for _ in range(2)]
        for number, application in enumerate(started):
            application.call("create", f"arena-{number}", PAGES)
            application.call("fill", f"arena-{number}", 7, 0, PAGES - 100)
            for page in range(PAGES - 100, PAGES - 50):
                application.call("write", f"arena-{number}", page * PAGE, bytes(8).hex())
        yield started


def bytes_of(application: Application, number: int) -> str:
    return str(application.call("digest", f"arena-{number}"))


def expected() -> str:
    return hashlib.sha256(content(7, PAGES - 100) + bytes(100 * PAGE)).hexdigest()


def shared(application: Application, number: int) -> int:
    return int(application.call("pagemap", f"arena-{number}").count(SHARED))


def seal_both(applications: list[Application]) -> None:
    for number, application in enumerate(applications):
        application.call("seal", f"arena-{number}")


def test_sealed_arenas_share(applications: list[Application]) -> None:
    seal_both(applications)
    report = applications[0].call("share", "arena-0")
    assert report["shared"] == PAGES - 100
    for number, application in enumerate(applications):
        # zeros went back to the kernel
        entries = application.call("pagemap", f"arena-{number}")
        assert not any(entry >= 4 for entry in entries[PAGES - 100 :])
        assert bytes_of(application, number) == expected()
        assert shared(application, number) == PAGES - 100
        # neighbours stay neighbours
        stores = [m for m in application.call("mappings", f"arena-{number}") if m[2]]
        assert len(stores) == 1


def test_unshare_and_close_leave_private_bytes(applications: list[Application]) -> None:
    seal_both(applications)
    applications[0].call("share", "arena-0")
    applications[0].call("unshare", "arena-0")
    assert shared(applications[0], 0) == 0
    assert shared(applications[1], 1) == PAGES - 100
    assert bytes_of(applications[0], 0) == expected()
    applications[1].call("close", "arena-1", True)
    assert bytes_of(applications[1], 1) == expected()


def test_views_are_read_only_and_discard_is_refused(applications: list[Application]) -> None:
    seal_both(applications)
    seal_both(applications)  # twice is fine
    with pytest.raises(ApplicationError, match="SealedError"):
        applications[0].call("discard", "arena-0", 0, 1)
    assert applications[0].call("writable", "arena-0") is False


def test_a_write_to_a_sealed_arena_is_a_signal(applications: list[Application]) -> None:
    assert applications[0].call("write_sealed", "arena-0") == signal.SIGSEGV


@pytest.mark.needs("userfaultfd", "move", "wp_tmpfs", "remap")
def test_sealing_what_is_shared_already(up: Up, tmp_path: Path) -> None:
    with Application(up.host()) as one, Application(up.host()) as other:
        for number, application in enumerate((one, other)):
            application.call("create", f"s-{number}", PAGES)
            application.call("fill", f"s-{number}", 9)
        assert one.call("share", "s-0")["shared"] == PAGES
        one.call("seal", "s-0")
        assert one.call("stats", "s-0")["shared"] == PAGES
        # the other one is not sealed: its writes are its own
        other.call("write", "s-1", 0, "c0ffee")
        assert one.call("digest", "s-0") == hashlib.sha256(content(9, PAGES)).hexdigest()
        one.call("unshare", "s-0")
        assert one.call("stats", "s-0")["private"] == PAGES
        assert one.call("digest", "s-0") == hashlib.sha256(content(9, PAGES)).hexdigest()


@pytest.mark.needs("userfaultfd", "move", "wp_tmpfs", "remap")
def test_sealed_and_writable_arenas_share_with_each_other(up: Up) -> None:
    with Application(up.host()) as one, Application(up.host()) as other:
        for number, application in enumerate((one, other)):
            application.call("create", f"m-{number}", PAGES)
            application.call("fill", f"m-{number}", 11)
        other.call("seal", "m-1")
        assert one.call("share", "m-0")["shared"] == PAGES
        assert other.call("stats", "m-1")["shared"] == PAGES
        one.call("fill", "m-0", 12)
        assert one.call("stats", "m-0")["shared"] == 0
        assert other.call("digest", "m-1") == hashlib.sha256(content(11, PAGES)).hexdigest()
