"""May some living process still map this store? The kernel answers, by locks on open files.

Theory. Every descriptor that an agent gets is an open file description of its own, with a read
lock (an open file description lock) on one byte: the byte at the offset `number`, far beyond any
slot. Such a lock belongs to the open file, not to a process: copies of the descriptor, forked
children and mappings keep the open file and thus the lock, and it goes with the last of them,
however the process ended. So the merger need not be told of a death, nor have been there when it
happened. See docs/decisions/0002-store-locks.md.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct

from samepage_merger.store import Store

_FLOCK = struct.Struct("@hhqqi0q")
_NUMBER_BITS = 62
_END = 2**63 - 1

#: In live(): somebody locked a range of its own making, under which any number may hide.
FOREIGN = 0


class StoreLocks:
    """The locks on one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def issue(self) -> tuple[int, int]:
        """Return a new lock's number, and the locked descriptor for an agent.

        The caller passes the descriptor on and closes its own copy: from then on the lock stands
        for the agent.
        """
        number = secrets.randbits(_NUMBER_BITS)
        while number == FOREIGN or self.held(number):
            number = secrets.randbits(_NUMBER_BITS)
        fd = self._store.open_for_agent()
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, number, 1))
        return number, fd

    def held(self, number: int) -> bool:
        """Return whether any process still holds the open file of this lock."""
        return _conflict(self._store.fd, number, 1) is not None

    def live(self) -> frozenset[int]:
        """Return the numbers of all locks that stand; FOREIGN is among them when others do."""
        numbers = set()
        gaps = [(0, _END)]
        while gaps:
            start, end = gaps.pop()
            found = _conflict(self._store.fd, start, end - start)
            if found is None:
                continue
            lock_start, lock_length = found
            numbers.add(lock_start if lock_length == 1 else FOREIGN)
            lock_end = lock_start + lock_length if lock_length else _END
            if lock_start > start:
                gaps.append((start, lock_start))
            if lock_end < end:
                gaps.append((lock_end, end))
        return frozenset(numbers)

    def is_store(self, fd: int) -> bool:
        """Return whether a descriptor that an agent sent is one of this very file."""
        return os.path.samestat(os.fstat(fd), os.fstat(self._store.fd))

    def proves(self, fd: int, number: int) -> bool:
        """Return whether a descriptor that an agent sent is the one that owns the lock.

        To its owner a lock is no conflict; to everyone else it is.
        """
        if not FOREIGN < number < 2**_NUMBER_BITS or not self.is_store(fd):
            return False
        try:
            seen_by_agent = _conflict(fd, number, 1)
        except OSError:
            return False
        return seen_by_agent is None and self.held(number)


def _flock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def _conflict(fd: int, start: int, length: int) -> tuple[int, int] | None:
    """Return start and length of some lock in the range that another open file holds."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))
    kind, _, found_start, found_length, _ = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else (found_start, found_length)
