"""Files that may change while a daemon runs."""

from __future__ import annotations

from pathlib import Path

Look = tuple[tuple[int, ...], ...]


def look(*paths: Path) -> Look:
    """What differs once one of the files was written or replaced, also through a symbolic link."""
    found: list[tuple[int, ...]] = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            found.append(())
        else:
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
