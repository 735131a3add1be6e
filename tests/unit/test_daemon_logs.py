"""Logs are JSON lines on standard error, those of libraries included."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from samepage.daemon import logs
from samepage.daemon.config import ConfigError


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "index", "host-a")
    structlog.get_logger("x").debug("not shown")
    structlog.get_logger("x").info("shown", pages=3)
    logging.getLogger("asyncio").warning("from %s", "a library")
    own, library = map(json.loads, capsys.readouterr().err.splitlines())
    assert own.pop("timestamp").endswith("Z")
    assert own == {
        "event": "shown",
        "level": "info",
        "pages": 3,
        "service": "index",
        "node": "host-a",
    }
    assert library["event"] == "from a library"
    assert library["service"] == "index"
    assert library["logger"] == "asyncio"


def test_exceptions_are_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning", "index", "")
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("failed")
    line = json.loads(capsys.readouterr().err)
    assert "ValueError: broken" in line["exception"]
    assert "node" not in line


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="log_level must be one of debug, info"):
        logs.configure("loud", "index", "")


@pytest.mark.parametrize(
    "daemon", ["samepage_index", "samepage_merger", "samepage_merger.holding", "samepage_scanner"]
)
def test_daemons_start_without_what_only_terminals_need(daemon: str) -> None:
    code = f"import sys, {daemon}.__main__; print('rich' in sys.modules); import rich"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
