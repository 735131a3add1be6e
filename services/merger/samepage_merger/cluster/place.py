"""Where an arena is that migrates, so that its host knows it after it has lost everything else."""

from __future__ import annotations

from dataclasses import dataclass

from samepage.v1 import pages_pb2
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


def place_told(message: pages_pb2.SnapshotResponse | pages_pb2.LeaveRequest) -> Place:
    """Return the place that a source tells, or is told again."""
    told = message.process
    process = Process(told.pid, told.inode, told.namespace)
    return Place(message.store_id, message.agent, message.arena, process)
