"""Which process an arena is in, so that a later merger of the same machine can see that it ended.

Theory. A process's number says nothing by itself: it means something in one pid namespace, and is
given anew when the process is gone. So it is kept with that namespace, and with the inode of its
pidfd, which no other process ever has (Linux 6.9; on older kernels all have the same, and a process
that has the number now counts as this one). Both errors that remain are on the safe side: a
namespace's own number is given anew only when all of its processes have ended, and what cannot be
told is not told. That a pidfd is readable means that every thread of the process has ended, also
when nobody has reaped it; a thread that ends lets go of the memory first. A process that has called
exec counts as this one, though its arenas are gone.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from pathlib import Path

_PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Process:
    """One process; `pid` is 0 where that is not known.

    Attributes:
        inode: of its pidfd.
        namespace: in which its pid is meant.
    """

    pid: int = 0
    inode: int = 0
    namespace: str = ""


UNKNOWN = Process()


def identify(pid: int) -> Process:
    """Return the process that has a pid in this one's namespace; UNKNOWN if that cannot be told."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return UNKNOWN
    try:
        return Process(pid, os.fstat(fd).st_ino, _namespace())
    except OSError:
        return UNKNOWN
    finally:
        os.close(fd)


def has_ended(process: Process) -> bool:
    """Return whether a process has surely ended."""
    try:
        if process.pid <= 0 or process.namespace != _namespace():
            return False
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return os.fstat(fd).st_ino != process.inode or bool(poll.poll(0))
    finally:
        os.close(fd)


def _namespace() -> str:
    status = _PID_NAMESPACE.stat()
    return f"{status.st_dev}:{status.st_ino}"
