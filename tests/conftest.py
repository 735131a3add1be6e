"""Skips with a reason what this machine cannot run, and with SAMEPAGE_NO_SKIPS=1 nothing else."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import needs
import pytest

# gRPC starts threads in a forked child, which die noisily when it closes its descriptors to exec:
# no child of the tests uses the gRPC of its parent.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

STRICT = os.environ.get("SAMEPAGE_NO_SKIPS", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Give each of the processes that share the tests a short temporary directory: the paths of
    unix sockets in it are limited to 107 bytes."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        config.option.basetemp = Path(config.option.basetemp).with_name(worker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        lacking = needs.missing(*marker.args)
        if lacking is not None:
            pytest.skip(lacking)


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
