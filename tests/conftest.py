"""Skips with a reason what this machine cannot run, and with SAMEPAGE_NO_SKIPS=1 nothing else."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Generator
from pathlib import Path

import needs
import pytest

# gRPC starts threads in a forked child, which die noisily when it closes its descriptors to exec:
# no child of the tests uses the gRPC of its parent.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# How much longer than its timeout a test may take until its process is ended.
GRACE_SECONDS = 180

STRICT = os.environ.get("SAMEPAGE_NO_SKIPS", "") not in ("", "0")


class FailuresAtOnce:
    """Tells why a test failed when it fails: the end of a run may never come."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            took = f"{report.when}, {report.duration:.0f} s"
            self._terminal.write_line(f"\nFAILED {report.nodeid} ({took})")
            self._terminal.write_line(report.longreprtext[-4000:])


def pytest_configure(config: pytest.Config) -> None:
    """Give each of the processes that share the tests a short temporary directory: the paths of
    unix sockets in it are limited to 107 bytes."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        config.option.basetemp = Path(config.option.basetemp).with_name(worker)


def pytest_sessionstart(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        session.config.pluginmanager.register(FailuresAtOnce(terminal))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    for marker in item.iter_markers("needs"):
        lacking = needs.missing(*marker.args)
        if lacking is not None:
            pytest.skip(lacking)
    _end_if_stuck(item)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    _end_if_stuck(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end_if_stuck(item: pytest.Item) -> None:
    """End this process, with the stacks of its threads, when a test is stuck where no exception of
    pytest-timeout reaches it: in a page fault, or in a teardown after it has timed out. One such
    test would keep the whole run from ending."""
    marker = item.get_closest_marker("timeout")
    seconds = marker.args[0] if marker is not None else float(item.config.getini("timeout"))
    stderr = sys.__stderr__
    assert stderr is not None
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, file=stderr, exit=True)


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure when the kernel could have run the test."""
    if not STRICT or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not needs.excused(text):
        report.outcome = "failed"
        report.longrepr = f"skipped though this kernel can run it (SAMEPAGE_NO_SKIPS): {text}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)
    return report
