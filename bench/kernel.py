"""What /proc and /sys tell: processor time, memory, kernel samepage merging and its settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from samepage.cli.demo import measure

KSM = Path("/sys/kernel/mm/ksm")


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes and their children so far; resolution one clock tick."""
    return sum(measure.cpu_seconds(pid) for pid in pids)


def pss(pids: Iterable[int]) -> int:
    """Bytes of the processes' memory, each shared page split among those that map it."""
    return sum(measure.byte_fields(Path(f"/proc/{pid}/smaps_rollup"))["Pss"] for pid in pids)


def thread_named(name: str) -> int | None:
    """Process id of a kernel thread."""
    for stat in Path("/proc").glob("[0-9]*/comm"):
        try:
            if stat.read_text().strip() == name:
                return int(stat.parent.name)
        except OSError:
            continue
    return None


def ksm_value(name: str) -> int:
    """One of KSM's counters or settings."""
    return int((KSM / name).read_text())


def ksm_obstacle() -> str | None:
    """Why KSM cannot be measured here, None when it can."""
    if not KSM.is_dir():
        return f"this kernel has no {KSM}"
    if not os.access(KSM / "run", os.W_OK):
        return f"only root may write {KSM}/run"
    if ksm_value("run") or ksm_value("pages_shared"):
        return "KSM is in use on this machine"
    return None


@contextmanager
def ksm_flat_out() -> Iterator[None]:
    """KSM's settings for as fast as it goes, stopped; afterwards all are as they were."""
    flat_out = {"pages_to_scan": "100000", "sleep_millisecs": "0", "smart_scan": "0"}
    before = {name: (KSM / name).read_text() for name in (*flat_out, "run")}
    try:
        (KSM / "run").write_text("0")
        for name, value in flat_out.items():
            (KSM / name).write_text(value)
        yield
    finally:
        for name, value in before.items():
            (KSM / name).write_text(value)
