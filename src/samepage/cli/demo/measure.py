"""What the kernel says about memory and CPU time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Memory of a host's workers. Everything in bytes.

    Attributes:
        pss: sum of Pss over the workers (/proc/PID/smaps_rollup).
        pss_store: the part of it that are mapped pages of the store.
        store: pages of the store that are resident, mapped or not.
    """

    pss: int
    pss_store: int
    store: int

    @property
    def total(self) -> int:
        """All together, each page counted once, in bytes."""
        return self.pss - self.pss_store + self.store


def memory(workers: Iterable[int], store: Path) -> Memory:
    """Measure the workers with these process ids, and the host's store in a tmpfs directory."""
    pss = pss_store = 0
    for pid in workers:
        fields = byte_fields(Path(f"/proc/{pid}/smaps_rollup"))
        pss += fields["Pss"]
        pss_store += fields["Pss_Shmem"]
    return Memory(pss, pss_store, resident_bytes(store))


def resident_bytes(store: Path) -> int:
    """Return what the files of a directory on a tmpfs hold, by their block counts, in bytes."""
    if not store.is_dir():
        return 0
    return sum(file.stat().st_blocks * 512 for file in store.iterdir() if file.is_file())


def available_bytes() -> int:
    """Return the memory that processes can still get, in bytes."""
    return byte_fields(Path("/proc/meminfo"))["MemAvailable"]


def byte_fields(file: Path) -> dict[str, int]:
    """Parse lines such as "Pss:   12 kB"; in bytes."""
    fields = {}
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            fields[words[0].removesuffix(":")] = int(words[1]) * 1024
    return fields


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its living children have used, in seconds."""
    ticks: int = os.sysconf("SC_CLK_TCK")
    return sum(_ticks(process) for process in [pid, *_children(pid)]) / ticks


def _ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0  # it has ended
    # The name, in parentheses, may hold spaces; user and system time are fields 14 and 15.
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []  # it has ended
