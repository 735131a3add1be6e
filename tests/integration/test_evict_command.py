"""`samepage evict` on a real arena: its memory leaves, and comes back as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from application import Application
from helpers.up import running

PAGES = 2000

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")


def samepage(directory: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "samepage", *arguments, "--dir", str(directory), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    rows: list[dict[str, Any]] = found["hosts"] if isinstance(found, dict) else found
    return rows


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
