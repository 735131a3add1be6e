"""What can go wrong in the index.

SamepageError
├── NameTakenError              another host has this name: give each one of its own
└── ServiceUnavailableError
    ├── StoreUnavailableError   Redis is away, or does not do what it must
    └── ForgottenError          the index lost this host: announce it again
"""

from __future__ import annotations

from samepage.errors import SamepageError, ServiceUnavailableError


class StoreUnavailableError(ServiceUnavailableError):
    """Redis cannot be used; the text says why. Nothing is lost but time: try again."""


class ForgottenError(ServiceUnavailableError):
    """The index does not know the publishing host any more: announce, and stream anew."""


class NameTakenError(SamepageError):
    """Two hosts use one name. Until the other's lease ends this one is no part of the cluster."""

    def __init__(self, name: str, address: str, remaining_ms: int) -> None:
        super().__init__(
            f"another host is in the cluster as {name!r}, with its merger at"
            f" {address or 'no address'}: give each host a name of its own (`node`). A host that"
            f" has moved is let in when its old lease ends, in {remaining_ms / 1000:.1f} s"
        )
