"""The file beside a store that says which of its slots are held for other hosts.

Records are appended before a hold is granted, by one write each, so that whoever was granted one
can rely on it: the file is on the store's tmpfs, which outlives the merger as the store does. A
merger that is killed in the middle of a write leaves a part of a record at the end, which nobody
was told of: it is cut off. When most of the file is out of date, it is written anew.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage_merger.store import StoreFullError

#: A slot that is held, and the key of its digest.
ENTRY = np.dtype([("key", "<u8"), ("slot", "<i8")])
NO_ENTRIES: npt.NDArray[np.void] = np.empty(0, ENTRY)

_HEADER = struct.Struct("<BxHHxxI16sdQ")
_NO_SNAPSHOT = bytes(16)


class Kind(enum.IntEnum):
    """What a record says."""

    #: A lease exists, until `expires`.
    LEASE = 1
    #: These slots are held by it.
    GRANT = 2
    #: These are not any more.
    RELEASE = 3
    #: It is over.
    END = 4


@dataclass(frozen=True)
class Record:
    """One record; `owner` and `snapshot` name the lease."""

    kind: Kind
    owner: str
    snapshot: bytes = _NO_SNAPSHOT
    expires: float = 0.0
    arena: str = ""
    lock: int = 0
    entries: npt.NDArray[np.void] = field(default_factory=lambda: NO_ENTRIES)

    def pack(self) -> bytes:
        """Return the record's bytes."""
        owner, arena = self.owner.encode(), self.arena.encode()
        header = _HEADER.pack(
            self.kind,
            len(owner),
            len(arena),
            self.entries.size,
            self.snapshot,
            self.expires,
            self.lock,
        )
        return header + owner + arena + self.entries.tobytes()


class HoldFile:
    """The file at a path; made when there is something to say."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.size = 0

    def read(self) -> Iterator[Record]:
        """Return what it says, and cut off a part of a record at its end."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        at = 0
        while (record := _unpack(data, at)) is not None:
            yield record
            at += len(record.pack())
        if at < len(data):
            os.truncate(self._path, at)
        self.size = at

    def append(self, record: Record) -> None:
        """Note a record.

        Raises:
            StoreFullError: there is no room for it; nothing is noted.
        """
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o600)
        data = record.pack()
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            raise StoreFullError from error
        if written < len(data):
            os.ftruncate(self._fd, self.size)
            raise StoreFullError
        self.size += written

    def rewrite(self, records: Iterable[Record]) -> None:
        """Let the file say this alone; when there is no room for that, it stays as it is."""
        draft = self._path.with_name(self._path.name + ".new")
        data = b"".join(record.pack() for record in records)
        try:
            draft.write_bytes(data)
        except OSError:
            draft.unlink(missing_ok=True)
            return
        draft.replace(self._path)
        self.close()
        self.size = len(data)

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unpack(data: bytes, at: int) -> Record | None:
    """Return the record at an offset, unless it is not there in full."""
    if len(data) - at < _HEADER.size:
        return None
    kind, owner_bytes, arena_bytes, count, snapshot, expires, lock = _HEADER.unpack_from(data, at)
    at += _HEADER.size
    text = data[at : at + owner_bytes + arena_bytes]
    at += owner_bytes + arena_bytes
    if len(data) - at < count * ENTRY.itemsize:
        return None
    entries = np.frombuffer(data, ENTRY, count, at) if count else NO_ENTRIES
    owner, arena = text[:owner_bytes].decode(), text[owner_bytes:].decode()
    return Record(Kind(kind), owner, snapshot, expires, arena, lock, entries)
