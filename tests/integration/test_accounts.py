"""Accounts of real processes, against what the kernel says of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from application import PAGE, Application
from helpers.up import Up, running

import samepage
from samepage.reports import ACCOUNT_FIELDS, total

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

PAGES = 24576

# Buffers go back to the kernel, so that an application grows by its arena alone.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("accounts")) as up:
        yield up


@pytest.fixture
def node(cluster: Up) -> Iterator[samepage.Node]:
    with samepage.connect(cluster.host()) as node:
        yield node


def pss(pid: int) -> int:
    """Bytes, without files: their share moves with every process that maps the same library."""
    fields = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))


def warm_up(application: Application) -> None:
    """Have it use its windows: they are no part of an arena, and stay when arenas go."""
    for name in ("warming-up", "warming-too"):
        application.call("create", name, 8192, f"domain-{application.pid}")
        application.call("fill", name, 1)
    assert application.call("share", "warming-up")["shared"] == 8192
    for name in ("warming-up", "warming-too"):
        application.call("close", name)


def assert_adds_up(account: samepage.HostAccount) -> None:
    whole = {name: getattr(account, name) for name in ACCOUNT_FIELDS}
    assert whole == total(account.arenas) == total(account.processes) == total(account.domains)
    for part in (account, *account.arenas, *account.processes, *account.domains):
        assert part.pages == (
            part.private_pages + part.shared_pages + part.absent_pages + part.unknown_pages
        )
    assert account.store_bytes == account.proportional_bytes + account.unattributed_bytes


def test_accounts_are_what_the_kernel_says(cluster: Up, node: samepage.Node) -> None:
    """Three processes that share some, have some of their own, and leave some untouched."""
    host = cluster.host()
    with (
        Application(host, env=FRUGAL) as one,
        Application(host, env=FRUGAL) as two,
        Application(host, env=FRUGAL) as three,
    ):
        applications = (one, two, three)
        for application in applications:
            warm_up(application)
        before = [pss(application.pid) for application in applications]
        for number, application in enumerate(applications):
            application.call("create", f"arena-{number}", PAGES, "books")
            application.call("fill", f"arena-{number}", 1, 0, 12000)
            application.call("fill", f"arena-{number}", 2 + number, 12000, 4500)
            application.call("fill", f"arena-{number}", 7 + number % 2, 18000, 3000)
        # what is only read takes no memory, whatever the page map says
        three.call("read", "arena-2", 22500 * PAGE, 100 * PAGE)
        for number, application in enumerate(applications):
            application.call("share", f"arena-{number}")
        one.call("write", "arena-0", 50 * PAGE, "beef")
        account = node.account()
        assert_adds_up(account)
        assert account.unattributed_bytes == account.unknown_pages == 0
        assert [arena.name for arena in account.arenas] == ["arena-0", "arena-1", "arena-2"]
        for number, application in enumerate(applications):
            arena = account.arenas[number]
            process = next(one for one in account.processes if one.pid == application.pid)
            assert arena.pid == application.pid and process.command.startswith("python")
            assert process.memory_bytes == arena.memory_bytes
            assert arena.absent_pages == PAGES - 12000 - 4500 - 3000
            mapped = application.call("pss", f"arena-{number}")
            assert arena.memory_bytes == pytest.approx(mapped, rel=0.01)
            grown = pss(application.pid) - before[number]
            assert process.memory_bytes == pytest.approx(grown, rel=0.01)
            stats = application.call("stats", f"arena-{number}")
            assert (stats["private"], stats["shared"], stats["absent"]) == (
                arena.private_pages,
                arena.shared_pages,
                arena.absent_pages,
            )
        # two sharers of three thousand pages, three of the rest but for what was written
        assert account.arenas[1].saved_bytes < account.arenas[2].saved_bytes
        saved = 2 * 12000 + 3000
        assert saved - 64 <= account.saved_bytes // PAGE <= saved - 1
        assert account.saved_bytes == node.stats().saved_bytes
        listed = {arena.name: arena.saved_bytes for arena in node.arenas()}
        assert listed == {arena.name: arena.saved_bytes for arena in account.arenas}


def test_a_process_in_another_connection_counts_once(node: samepage.Node, cluster: Up) -> None:
    with (
        samepage.connect(cluster.host()) as other,
        node.create_arena("mine", 10 * PAGE) as mine,
        other.create_arena("more", PAGE) as more,
    ):
        mine.buffer[0] = more.buffer[0] = 1
        [process] = node.account().processes
        assert (process.pid, process.arenas, process.private_pages) == (os.getpid(), 2, 2)
        assert process.absent_pages == 9


def test_accounts_after_everyone_left(node: samepage.Node) -> None:
    account = node.account()
    assert_adds_up(account)
    assert (account.pages, account.arenas, account.processes) == (0, (), ())
    assert account.store_bytes == 0
