"""What can go wrong with held arenas, on top of samepage.errors.

SamepageError
├── LimitError   this helper holds, or does, no more: delete arenas, or try again later
├── RangeError   bytes beyond the arena's end: fix the call
└── IdleError    a stream stood still: call again, from where it stopped
"""

from __future__ import annotations

from samepage.errors import SamepageError


class LimitError(SamepageError):
    """A limit of this helper is reached; the text says which, and what to do."""


class RangeError(SamepageError):
    """The call would read or write beyond the arena's end: fix the call."""


class IdleError(SamepageError):
    """The client sent or took nothing for too long: call again, from where it stopped."""
