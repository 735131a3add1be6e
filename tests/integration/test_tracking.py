"""Passes over agents that track writes, on a real host: they cost what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest
from application import PAGE, Application, content
from helpers.up import Up, running, samepage
from helpers.waiting import until

pytestmark = pytest.mark.needs(
    "root", "userfaultfd", "move", "wp_tmpfs", "remap", "pagemap_scan", "tracking"
)

PAGES = 4096


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster")) as up:
        policy = ("interval_seconds=0.02", "interval_max_seconds=0.02", "cpu_percent=100")
        done = samepage("policy", *policy, "recheck_seconds=1e7", "--dir", up.directory)
        assert done.returncode == 0, done.stderr
        yield up


class Passes:
    """What the scanner counted."""

    def __init__(self, cluster: Up) -> None:
        self._cluster = cluster

    def read(self) -> tuple[int, int]:
        """Passes, and fingerprints made."""
        done = samepage("status", "--dir", self._cluster.directory, "--json")
        scanner = json.loads(done.stdout)["hosts"][0]["scanner"]
        return scanner["passes"], scanner["pages_scanned"]

    async def more(self) -> None:
        """Let passes go by: one that began before, and two whole ones."""
        passes, _ = self.read()
        await until(lambda: self.read()[0] >= passes + 3)


async def test_passes_fingerprint_what_was_written(cluster: Up) -> None:
    passes = Passes(cluster)
    with Application(cluster.host()) as application:
        application.call("create", "a", PAGES)
        application.call("fill", "a", 1)
        await passes.more()
        before, scanned = passes.read()
        assert scanned >= PAGES
        await passes.more()
        assert passes.read()[1] == scanned
        for page in range(0, PAGES, 100):
            application.call("write", "a", page * PAGE + 17, "beef")
        await passes.more()
        after, now = passes.read()
        # Each once, or a few more often that a pass caught while they were being written.
        assert PAGES // 100 < now - scanned <= 2 * (PAGES // 100 + 1)
        assert after > before


async def test_background_passes_merge_what_stands_still(cluster: Up) -> None:
    """And merge it again after writes that make it equal again."""
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application, name in ((one, "one"), (two, "two")):
            application.call("create", name, PAGES)
            application.call("fill", name, 2)

        def all_shared() -> bool:
            return all(
                application.call("stats", name)["shared"] == PAGES
                for application, name in ((one, "one"), (two, "two"))
            )

        await until(all_shared)
        for application, name in ((one, "one"), (two, "two")):
            application.call("fill", name, 3, 1000, 500)
        await until(all_shared)
        written = bytearray(content(2, PAGES))
        written[1000 * PAGE : 1500 * PAGE] = content(3, 500)
        digest = hashlib.sha256(written).hexdigest()
        assert one.call("digest", "one") == two.call("digest", "two") == digest
