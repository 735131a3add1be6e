"""Notes of what this host has asked others for, so that a merger that restarts ends it.

One small file a snapshot, beside the stores: gone when the snapshot was ended. That of a migration
that was handed over stays for as long as the arena lives here, since it is the word that the arena
is this host's now.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

_SUFFIX = ".clone"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Note:
    """One snapshot at another host, and the arena here that is made of it.

    Attributes:
        host: the other one.
        snapshot: its id, as hexadecimal digits; `agent` and `domain_id` likewise.
        number, lock: of the arena.
        leaving: the source is asked to leave, or has left: it may be no owner any more.
        left: it has.
        freeze_us: how long its writers had to wait, in microseconds.
        sealed: the source could only be read.
        source_store, source_agent, source_number: where the source has the arena.
        source_pid, source_inode, source_namespace: in which process (process.py).
    """

    host: str
    snapshot: str
    agent: str = ""
    domain_id: str = ""
    number: int = 0
    lock: int = 0
    leaving: bool = False
    left: bool = False
    freeze_us: int = 0
    sealed: bool = False
    source_store: str = ""
    source_agent: str = ""
    source_number: int = 0
    source_pid: int = 0
    source_inode: int = 0
    source_namespace: str = ""


class Journal:
    """The notes in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, note: Note) -> None:
        """Keep a note, instead of an older one of the same snapshot.

        Raises:
            OSError: it cannot be written.
        """
        path = self._path(note)
        draft = path.with_suffix(f"{_SUFFIX}.new")
        draft.write_text(json.dumps(asdict(note)))
        os.replace(draft, path)

    def forget(self, note: Note) -> None:
        """Keep it no longer; one that is not there is no error."""
        self._path(note).unlink(missing_ok=True)

    def read(self) -> list[Note]:
        """Return the notes of this merger's earlier lives."""
        notes = []
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                notes.append(replace(Note("", ""), **json.loads(path.read_text())))
            except (ValueError, TypeError) as error:
                log.warning("a note that makes no sense", path=str(path), why=str(error))
        return notes

    def _path(self, note: Note) -> Path:
        return self._directory / f"{note.snapshot}{_SUFFIX}"
