"""How much memory this host has left, as the kernel tells.

What counts is the least of what /proc/meminfo calls available and of what the limits of the
merger's own control group and of those around it leave. Of a group's memory, file pages that nobody
used lately count as free: the kernel drops them first.

Some memory is left out of it, for the moment between the last sharer's private copy of a page and
the merger's hearing of it: until then the slot is there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESERVE_BYTES = 64 << 20

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# What the first version of control groups says for "no limit", less rounding.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class _Group:
    """The files of one control group, and the field of its memory.stat for unused file pages."""

    limit: Path
    usage: Path
    stat: Path
    unused: str

    def left(self) -> int | None:
        """Bytes that its limit leaves; None when it has none."""
        try:
            limit = self.limit.read_text().strip()
            if limit == "max" or int(limit) >= _NO_LIMIT:
                return None
            usage = int(self.usage.read_text())
            fields = dict(line.split() for line in self.stat.read_text().splitlines())
        except OSError:
            return None
        return max(0, int(limit) - usage + int(fields.get(self.unused, 0)))


class HostMemory:
    """The host's memory; a test gives other directories.

    Args:
        proc: /proc.
        cgroups: where control groups are mounted.
    """

    def __init__(self, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> None:
        self._meminfo = proc / "meminfo"
        self._groups = list(_groups(proc / "self/cgroup", cgroups))

    def available(self) -> int:
        """Bytes that the host can still give to its processes, now, less the reserve."""
        left = [group.left() for group in self._groups]
        least = min([self._meminfo_available(), *(some for some in left if some is not None)])
        return max(0, least - RESERVE_BYTES)

    def _meminfo_available(self) -> int:
        for line in self._meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"{self._meminfo} tells no MemAvailable")


def _groups(own: Path, mounted: Path) -> list[_Group]:
    """The groups that limit this process: its own, and those around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for directory in _upwards(mounted, path):
                found.append(
                    _Group(
                        directory / "memory.max",
                        directory / "memory.current",
                        directory / "memory.stat",
                        "inactive_file",
                    )
                )
        elif "memory" in controllers.split(","):
            for directory in _upwards(mounted / "memory", path):
                found.append(
                    _Group(
                        directory / "memory.limit_in_bytes",
                        directory / "memory.usage_in_bytes",
                        directory / "memory.stat",
                        "total_inactive_file",
                    )
                )
    return [group for group in found if group.limit.exists()]


def _upwards(root: Path, path: str) -> list[Path]:
    """The group's directory and all above it. In a container the path may not be visible; the
    root is its own group then."""
    group = root / path.lstrip("/")
    inside = [group, *group.parents]
    return inside[: inside.index(root) + 1]
