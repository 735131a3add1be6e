"""The CPU budget of background passes, by /proc, on a host with more to do than it allows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from application import Application
from helpers.up import Up, running, samepage

from samepage.v1 import scanner_pb2, scanner_pb2_grpc

pytestmark = [
    pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

PERCENT = 10
PAGES = 1 << 15
SECONDS = 60.0  # also the window of what the scanner shows


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Up]:
    with running(tmp_path) as up:
        yield up


def process_seconds(pid: int) -> float:
    """User and system CPU time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def agent_seconds(pid: int) -> float:
    """CPU time of the agents' threads in an application's process."""
    tasks = [
        task
        for task in Path(f"/proc/{pid}/task").iterdir()
        if (task / "comm").read_text() == "samepage-read\n"
    ]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def test_passes_take_their_share_of_a_core_and_no_more(cluster: Up) -> None:
    set_policy(cluster, "interval_seconds=0.001", "rest_passes_max=0", f"cpu_percent={PERCENT}")
    daemons = [cluster.daemons()[f"host-1/{service}"] for service in ("scanner", "merger")]
    with Application(cluster.host()) as one, Application(cluster.host()) as two:
        for application, name in ((one, "a"), (two, "b")):
            application.call("create", name, PAGES)
            application.start("rewrite", name, SECONDS + 10)

        def spent() -> float:
            seconds = sum(map(process_seconds, daemons))
            return seconds + agent_seconds(one.pid) + agent_seconds(two.pid)

        # Until what was saved up at first is spent.
        time.sleep(4)
        began, before = time.monotonic(), spent()
        time.sleep(SECONDS)
        used = 100 * (spent() - before) / (time.monotonic() - began)
        shown = background_cpu_percent(cluster)
        assert one.finish() > 1 and two.finish() > 1
    assert 0.8 * PERCENT <= used <= 1.2 * PERCENT
    assert 0.8 * PERCENT <= shown <= 1.3 * PERCENT


def set_policy(cluster: Up, *changes: str) -> None:
    done = samepage("policy", *changes, "--dir", cluster.directory)
    assert done.returncode == 0, done.stderr


def background_cpu_percent(cluster: Up) -> float:
    with grpc.insecure_channel(f"unix:{cluster.host()}/scanner-api.sock") as channel:
        request = scanner_pb2.GetScannerStatusRequest()
        return (
            scanner_pb2_grpc.ScannerStub(channel).GetScannerStatus(request).background_cpu_percent
        )
