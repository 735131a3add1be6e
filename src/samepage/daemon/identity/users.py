"""By user and groups, as the kernel tells them of the other end of a socket."""

from __future__ import annotations

from collections import Counter

from samepage.daemon.identity.base import Caller, Subject
from samepage.daemon.identity.policy import Policy


class UserIdentity:
    """A process's user and groups decide."""

    def __init__(self, policy: Policy) -> None:
        self.decided: Counter[str] = Counter()
        self._policy = policy

    def domain(self, caller: Caller, wanted: str) -> str:
        """See Identity."""
        return self._policy.choose(Subject(caller.uid, caller.gids), wanted)

    def present(self, caller: Caller, token: bytes) -> None:
        """Tokens are not asked for, and not looked at."""

    def forget(self, caller: Caller) -> None:
        """Nothing is remembered."""

    async def close(self) -> None:
        """Nothing to release."""
