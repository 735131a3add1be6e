"""What can go wrong in the index.

SamepageError
└── ServiceUnavailableError
    ├── StoreUnavailableError   Redis is away, or does not do what it must
    └── ForgottenError          the index lost this host: announce it again
"""

from __future__ import annotations

from samepage.errors import ServiceUnavailableError


class StoreUnavailableError(ServiceUnavailableError):
    """Redis cannot be used; the text says why. Nothing is lost but time: try again."""


class ForgottenError(ServiceUnavailableError):
    """The index does not know the publishing host any more: announce, and stream anew."""
