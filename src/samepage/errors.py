"""Every error that samepage raises.

SamepageError
├── InvalidArgumentError (ValueError)   fix the call
├── NameTakenError                      choose another name
├── NotRunningError (ConnectionError)   start the daemons, or point SAMEPAGE_DIR at them
├── ServiceUnavailableError             a daemon is away: memory is safe, try again later
├── ShareTimeoutError (TimeoutError)    what was begun goes on; ask again
├── FetchTimeoutError (TimeoutError)    pages go on coming; ask again
├── CloneTimeoutError (TimeoutError)    the arena stayed where it is; ask again, or allow more time
├── EvictTimeoutError (TimeoutError)    what was begun goes on; ask again
├── ProtocolVersionError                upgrade the older side
├── OutOfMemoryError (MemoryError)      ask for less
├── UnsupportedKernelError              see `samepage doctor`
├── PinnedError                         I/O is in flight: let it finish, then try again
├── SealedError                         the arena can only be read
├── PermissionDeniedError (PermissionError)   it is not for this process: ask the operator
├── LostError                           bytes are lost: no host has them any more
├── MigratedError                       the arena is another host's now: use it there
├── ClosedError (ValueError)            the arena or node is closed
├── ForkedError                         connect anew in the child
└── NotFoundError (LookupError)         no arena of that name
"""

from __future__ import annotations


class SamepageError(Exception):
    """Base of all; its text says what to do."""


class InvalidArgumentError(SamepageError, ValueError):
    """A size, name, domain or option is not what it must be: fix the call."""


class NameTakenError(SamepageError):
    """Another arena of this domain on this host has the name: choose another."""


class NotRunningError(SamepageError, ConnectionError):
    """No daemon answers in the socket directory: start it, or set SAMEPAGE_DIR."""


class ServiceUnavailableError(SamepageError):
    """A daemon or service is away. Memory is safe and usable; try again later."""


class ShareTimeoutError(SamepageError, TimeoutError):
    """share() did not finish in time. What was begun goes on; ask again."""


class FetchTimeoutError(SamepageError, TimeoutError):
    """Pages did not come from other hosts in time. They go on coming; ask again."""


class CloneTimeoutError(SamepageError, TimeoutError):
    """A clone or migration was not done in time, or not within the longest freeze that was allowed.
    Nothing is left of it here, and the source is as it was."""


class EvictTimeoutError(SamepageError, TimeoutError):
    """evict() did not finish in time. What was begun goes on; ask again."""


class ProtocolVersionError(SamepageError):
    """Library and daemon speak different protocol versions: upgrade the older one."""


class OutOfMemoryError(SamepageError, MemoryError):
    """More than the machine or the address space has: ask for less."""


class UnsupportedKernelError(SamepageError):
    """The kernel, or this process's rights, lack a feature: see `samepage doctor`."""


class PinnedError(SamepageError):
    """Pages of the arena are pinned for I/O: let it finish, then try again."""


class SealedError(SamepageError):
    """The arena was sealed: it can only be read from then on."""


class PermissionDeniedError(SamepageError, PermissionError):
    """Who this process is does not allow it: the text says what is, or ask the operator."""


class LostError(SamepageError):
    """Pages were on other hosts, and no host that held them is left. Touching one is a SIGBUS."""


class MigratedError(SamepageError):
    """The arena was migrated to another host: use it there. Touching it here is a SIGBUS."""


class ClosedError(SamepageError, ValueError):
    """The arena or node was closed."""


class ForkedError(SamepageError):
    """Arenas are not inherited over fork: connect anew in the child."""


class NotFoundError(SamepageError, LookupError):
    """There is no arena, or no host, of that name."""
