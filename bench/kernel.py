"""What /proc and /sys tell: processor time, memory, kernel samepage merging and its settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes so far, all threads; resolution one clock tick."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def pss(pids: list[int]) -> int:
    """Bytes of the processes' memory, each shared page split among those that map it."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def store_bytes(directory: Path) -> int:
    """Bytes of a store that are in memory."""
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


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
