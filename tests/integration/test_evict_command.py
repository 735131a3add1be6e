"""`samepage evict` on a real arena: its memory leaves, and comes back as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from application import Application
from helpers.up import running
from helpers.waiting import wait_until

PAGES = 2000

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")


def samepage(directory: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "samepage", *arguments, "--dir", str(directory), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    rows: list[dict[str, Any]] = found["hosts"] if isinstance(found, dict) else found
    return rows


def test_a_merger_that_stops_lets_go_of_what_it_holds(tmp_path: Path) -> None:
    """The owner fetches it first, which is why the merger serves for a while longer."""
    env = {
        "SAMEPAGE_MERGER_MIN_HOLDERS": "1",
        "SAMEPAGE_MERGER_HOLD_LEASE_SECONDS": "3600",
        "SAMEPAGE_SCANNER_INTERVAL_SECONDS": "1",
    }
    with (
        running(tmp_path / "cluster", 2, env=env) as cluster,
        Application(cluster.host(1)) as owner,
        Application(cluster.host(2)) as other,
    ):
        directory = cluster.directory
        for application in (owner, other):
            application.call("create", "arena", PAGES)
            application.call("fill", "arena", 11)
        before = owner.call("digest", "arena")
        other.call("share", "arena")
        wait_until(lambda: samepage(directory, "status")[1]["scanner"]["published"] == PAGES)
        assert owner.call("evict", "arena")["held_elsewhere"] == PAGES

        os.kill(cluster.daemons()["host-2/merger"], signal.SIGTERM)
        cluster.wait_for("message", "host-2/merger serves again")
        mine, holder = samepage(directory, "status")
        assert holder["merger"]["held_for_others"] == 0
        assert mine["merger"]["spilled"] == mine["merger"]["away_pages"] == PAGES
        other.end()
        assert owner.call("digest", "arena") == before


def test_an_arena_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path / "cluster") as cluster, Application(cluster.host()) as application:
        application.call("create", "arena", PAGES)
        application.call("fill", "arena", 11)
        before = application.call("digest", "arena")
        [gone] = samepage(cluster.directory, "evict", "arena")
        assert gone["spilled"] == PAGES and not gone["no_room"]
        [host] = samepage(cluster.directory, "status")
        assert host["merger"]["away_pages"] == host["merger"]["spilled"] == PAGES
        assert host["merger"]["spill_bytes"] > PAGES * 4096
        assert application.call("digest", "arena") == before
        [host] = samepage(cluster.directory, "status")
        assert host["merger"]["away_pages"] == 0
        assert host["merger"]["returned_total"] == PAGES
