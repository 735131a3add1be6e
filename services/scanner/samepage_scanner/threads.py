"""The CPU time of the threads that an agent runs in its application's process."""

from __future__ import annotations

from pathlib import Path

_NAME = "samepage-"


class Threads:
    """The agents' threads of a process, as /proc shows them."""

    __slots__ = ("_files", "_pid")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._files: list[Path] | None = None

    def cpu_seconds(self) -> float | None:
        """What they have spent since they began; None when that cannot be seen."""
        try:
            if self._files is None:
                self._files = self._find()
            nanoseconds = [int(file.read_text().split()[0]) for file in self._files]
        except (OSError, ValueError, IndexError):
            return None
        return sum(nanoseconds) / 1e9 if nanoseconds else None

    def _find(self) -> list[Path]:
        return [
            task / "schedstat"
            for task in Path(f"/proc/{self._pid}/task").iterdir()
            if (task / "comm").read_text().startswith(_NAME)
        ]
