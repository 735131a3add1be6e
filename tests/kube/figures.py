"""What the kernel says of processes: how much of a store they map, and whose share that is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_CGROUPS = Path("/sys/fs/cgroup/memory")
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+).*$")


class Mapped(NamedTuple):
    """What processes map of some files.

    Attributes:
        resident: bytes, of each process's own view.
        fair: the same, with each page split evenly among those that map it.
        files: how many there are.
    """

    resident: int
    fair: int
    files: int


def processes(pod: str) -> list[int]:
    """Return the processes of a pod, by what its control groups are called after."""
    hierarchy = _CGROUPS if _CGROUPS.is_dir() else _CGROUPS.parent
    return [
        int(pid)
        for group in hierarchy.rglob(f"*{pod}*")
        for file in group.rglob("cgroup.procs")
        for pid in file.read_text().split()
    ]


def mapped(pids: Iterable[int], store: Path) -> Mapped:
    """Return what processes map of the files in a store."""
    files = {(file.stat().st_dev, file.stat().st_ino) for file in store.iterdir()}
    sums = {"Rss": 0, "Pss": 0}
    seen = set()
    for pid in pids:
        file = None
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if found := _MAPPING.match(line):
                device = os.makedev(int(found[1], 16), int(found[2], 16))
                file = (device, int(found[3]))
            elif file in files:
                seen.add(file)
                name, value = line.split(":")
                if name in sums:
                    sums[name] += int(value.split()[0]) << 10
    return Mapped(sums["Rss"], sums["Pss"], len(seen))
