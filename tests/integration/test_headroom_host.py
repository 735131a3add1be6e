"""A host in a memory control group: what was promised can be had back, all at once.

Each step takes memory that merging freed. When a share is refused for want of headroom, that step's
arenas are given up; from then on every writer may write, and the kernel has no reason to kill.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from application import Application, content
from helpers.up import Up, running, samepage

from samepage_merger.memory import RESERVE_BYTES

MIB = 1 << 20
PAGES = 4096
ARENA_MIB = PAGES * 4096 // MIB
PART = 256
ROUNDS_MAX = 40
WRITTEN = hashlib.sha256(
    b"".join(content(-page, PART) for page in range(0, PAGES, PART))
).hexdigest()


class Group:
    """A memory control group below this process's own."""

    def __init__(self) -> None:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                self._parent = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
                self._limit = "memory.limit_in_bytes"
                self._usage = "memory.usage_in_bytes"
                break
        else:
            self._parent = Path("/sys/fs/cgroup") / path.lstrip("/")
            self._limit, self._usage = "memory.max", "memory.current"
        self.path = self._parent / f"samepage-test-{os.getpid()}"
        self.path.mkdir()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What is started meanwhile belongs to the group."""
        pid = str(os.getpid())
        (self.path / "cgroup.procs").write_text(pid)
        try:
            yield
        finally:
            (self._parent / "cgroup.procs").write_text(pid)

    def limit(self, more: int) -> None:
        """Allow so many bytes more than are used now."""
        (self.path / self._limit).write_text(str(self.used() + more))

    def used(self) -> int:
        """Bytes in use."""
        return int((self.path / self._usage).read_text())

    def remove(self) -> None:
        """Remove it when its last process has ended."""
        self.path.rmdir()


@pytest.fixture
def group() -> Iterator[Group]:
    try:
        group = Group()
        with group.inside():
            pass
        group.limit(1 << 40)
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    yield group
    group.remove()


@pytest.fixture
def up(tmp_path: Path, group: Group) -> Iterator[Up]:
    with ExitStack() as stack:
        with group.inside():
            up = stack.enter_context(running(tmp_path))
        yield up


def test_all_writers_write_at_once_and_nothing_is_killed(up: Up, group: Group) -> None:
    done = samepage("policy", "headroom_percent=100", "--dir", up.directory)
    assert done.returncode == 0, done.stderr
    with ExitStack() as stack:
        with group.inside():
            pair = [stack.enter_context(Application(up.host())) for _ in range(2)]
        group.limit(RESERVE_BYTES + 12 * ARENA_MIB * MIB)
        rounds = 0
        while rounds < ROUNDS_MAX:
            for number, application in enumerate(pair):
                application.call("create", f"{rounds}-{number}", PAGES)
                for page in range(0, PAGES, PART):
                    application.call(
                        "fill", f"{rounds}-{number}", rounds * PAGES + page, page, PART
                    )
            report = pair[1].call("share", f"{rounds}-1")
            if report["no_headroom"]:
                break
            assert report["shared"] == PAGES
            rounds += 1
        assert 2 <= rounds < ROUNDS_MAX
        assert report["merged"] + report["no_headroom"] == PAGES
        for number, application in enumerate(pair):
            application.call("close", f"{rounds}-{number}")
        for shared in range(rounds):
            for page in range(0, PAGES, PART):
                for number, application in enumerate(pair):
                    application.start("fill", f"{shared}-{number}", -page, page, PART)
                for application in pair:
                    application.finish()
        for shared in range(rounds):
            for number, application in enumerate(pair):
                assert application.call("stats", f"{shared}-{number}")["private"] == PAGES
                assert application.call("digest", f"{shared}-{number}") == WRITTEN
    assert set(up.daemons()) >= {"index", "host-1/merger", "host-1/scanner"}
