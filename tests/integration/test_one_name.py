"""Two hosts with one name: one of them is told so, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from application import Application
from helpers.index_harness import RedisServer
from helpers.up import running, samepage
from helpers.waiting import wait_until

PAGES = 64

pytestmark = [pytest.mark.needs("root"), pytest.mark.timeout(120)]


def status(directory: Path) -> tuple[int, dict[str, Any], list[str]]:
    """What `samepage status` exits with, its host, and its problems."""
    done = samepage("status", "--json", "--dir", directory)
    found = json.loads(done.stdout)
    return done.returncode, found["hosts"][0]["scanner"], found["problems"]


def test_two_clusters_on_one_redis(tmp_path: Path) -> None:
    """Both have a host-1."""
    server = RedisServer("valkey", tmp_path)
    env = {"SAMEPAGE_INDEX_REDIS_URL": server.url}
    try:
        with (
            running(tmp_path / "a", env=env) as first,
            running(tmp_path / "b", env=env) as second,
            Application(second.host()) as application,
        ):
            wait_until(lambda: status(second.directory)[2])
            code, scanner, problems = status(second.directory)
            assert code == 1
            assert problems == [f"host-1 is no part of the cluster: {scanner['index_refusal']}"]
            assert first.cluster.hosts[0].merger in problems[0]
            assert "refused" in samepage("status", "--dir", second.directory).stdout
            assert status(first.directory)[0] == 0

            for name in ("one", "other"):
                application.call("create", name, PAGES)
                application.call("fill", name, 7)
            assert application.call("share", "one")["shared"] == PAGES
            before = application.call("digest", "one")

            assert first.stop() == 0
            wait_until(lambda: status(second.directory)[0] == 0)
            assert status(second.directory)[1]["index_connected"]
            assert application.call("digest", "one") == before
    finally:
        server.kill()
