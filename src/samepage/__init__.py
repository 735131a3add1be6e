"""Identical memory, stored once: across the processes of a host and the hosts of a cluster.

import samepage

with samepage.connect() as node:
    with node.create_arena("embeddings", size="512MiB") as arena:
        arena.buffer[:5] = b"hello"
        print(arena.share())
"""

from samepage.arena import Arena
from samepage.client import Node, connect
from samepage.errors import (
    CloneTimeoutError,
    ClosedError,
    EvictTimeoutError,
    FetchTimeoutError,
    ForkedError,
    InvalidArgumentError,
    LostError,
    MigratedError,
    NameTakenError,
    NotFoundError,
    NotRunningError,
    OutOfMemoryError,
    PermissionDeniedError,
    PinnedError,
    ProtocolVersionError,
    SamepageError,
    SealedError,
    ServiceUnavailableError,
    ShareTimeoutError,
    UnsupportedKernelError,
)
from samepage.reports import (
    Account,
    ArenaAccount,
    ArenaInfo,
    ArenaStats,
    CloneProgress,
    DomainAccount,
    EvictReport,
    HostAccount,
    NodeStats,
    ProcessAccount,
    ShareReport,
)

__all__ = [
    "Account",
    "Arena",
    "ArenaAccount",
    "ArenaInfo",
    "ArenaStats",
    "CloneProgress",
    "CloneTimeoutError",
    "ClosedError",
    "DomainAccount",
    "EvictReport",
    "EvictTimeoutError",
    "FetchTimeoutError",
    "ForkedError",
    "HostAccount",
    "InvalidArgumentError",
    "LostError",
    "MigratedError",
    "NameTakenError",
    "Node",
    "NodeStats",
    "NotFoundError",
    "NotRunningError",
    "OutOfMemoryError",
    "PermissionDeniedError",
    "PinnedError",
    "ProcessAccount",
    "ProtocolVersionError",
    "SamepageError",
    "SealedError",
    "ServiceUnavailableError",
    "ShareReport",
    "ShareTimeoutError",
    "UnsupportedKernelError",
    "connect",
]
