"""Failpoints act once, in one process, and only where they are switched on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samepage.daemon import failpoints

_PASS_TWICE = """
from samepage.daemon import failpoints
failpoints.FAILPOINTS["here"] = "a test's own"
for _ in range(2):
    try:
        failpoints.failpoint("here")
        print("passed")
    except failpoints.FailpointError as error:
        print(error)
"""


def _run(directory: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "FAILPOINTS" not in name}
    if directory is not None:
        environment[failpoints.VARIABLE] = str(directory)
    return subprocess.run(
        [sys.executable, "-c", _PASS_TWICE], env=environment, capture_output=True, text=True
    )


def test_nothing_happens_without_the_variable(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("kill")
    assert _run(None).stdout.split() == ["passed", "passed"]
    assert (tmp_path / "here").exists()


def test_an_error_is_raised_once(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("error")
    assert _run(tmp_path).stdout.splitlines() == ["failpoint here", "passed"]
    assert not (tmp_path / "here").exists()


def test_a_kill_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("kill")
    assert _run(tmp_path).returncode == -signal.SIGKILL
    assert _run(tmp_path).stdout.split() == ["passed", "passed"]


def test_a_sleep_takes_its_time(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("sleep 0.3")
    began = time.monotonic()
    assert _run(tmp_path).stdout.split() == ["passed", "passed"]
    assert time.monotonic() - began >= 0.3


def test_a_place_that_is_not_listed_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="not in the list"):
        failpoints.failpoint("nowhere")


def test_every_listed_failpoint_stands_once_in_the_services() -> None:
    services = Path(__file__).parents[2] / "services"
    sources = "\n".join(path.read_text() for path in services.rglob("*.py"))
    found = re.findall(r"failpoint\(\"([a-z_.-]+)\"\)", sources)
    assert sorted(found) == sorted(failpoints.FAILPOINTS)
