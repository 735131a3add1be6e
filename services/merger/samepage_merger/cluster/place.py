"""Where an arena is that migrates, so that its host knows it after it has lost everything else."""

from __future__ import annotations

from dataclasses import dataclass

from samepage_merger.arena import Arena
from samepage_merger.cluster.process import UNKNOWN, Process


@dataclass(frozen=True)
class Place:
    """In which store of which machine's life, and whose it is; empty where that was not told."""

    store_id: bytes = b""
    agent: bytes = b""
    arena: int = 0
    process: Process = UNKNOWN

    def is_of(self, arena: Arena) -> bool:
        """Return whether an arena of that machine's life is the one."""
        return (arena.agent, arena.number) == (self.agent, self.arena)


NOWHERE = Place()
