"""What can go wrong with a snapshot."""

from __future__ import annotations

from samepage_merger.arena import Arena


class SnapshotError(Exception):
    """A snapshot cannot be made, or gone on with; the text says what to do."""


class NoArenaError(SnapshotError):
    """There is no such arena, or no such snapshot any more."""


class EndedError(SnapshotError):
    """The arena's process has ended, and nobody here knows any more to whom it had left it."""


class NoAnswerError(SnapshotError):
    """The arena's process, or a host that has pages of it, does not answer: ask again."""


class NotPossibleError(SnapshotError):
    """It cannot be done to this arena, as it is now."""


class TooLateError(SnapshotError):
    """There was not time enough."""


def no_answer(arena: Arena) -> NoAnswerError:
    """Return what says that an arena's process is silent."""
    return NoAnswerError(
        f"the process of arena {arena.name!r} does not answer: see whether it runs, and ask again"
    )
