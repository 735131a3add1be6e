"""What every way of telling who is who has in common."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Protocol

DEFAULT_DOMAIN = "default"
#: What may come of a process's wish; unknown: it could not be told.
OUTCOMES = ("allowed", "denied", "unknown")

# From which version of the agent protocol on a process may leave its domain out.
_SILENT_VERSION = 3


class DeniedError(Exception):
    """A process may not use a domain; `args` are an errno and a text that says what to do."""


class Caller(Protocol):
    """The other end of an agent's socket, by what the kernel says of it."""

    @property
    def pid(self) -> int:
        """0 when it is in a namespace that this process does not see."""

    @property
    def uid(self) -> int: ...

    @property
    def gids(self) -> frozenset[int]:
        """Its group, and its supplementary groups."""

    @property
    def version(self) -> int:
        """Of the agent protocol."""

    def in_control_group(self, *names: str) -> bool | None:
        """Whether its control group's path holds one of these; None when that cannot be seen."""

    def close(self) -> None:
        """End the connection."""


@dataclass(frozen=True)
class Subject:
    """Who a process is. Without a token, `namespace` and `service_account` are empty."""

    uid: int
    gids: frozenset[int]
    namespace: str = ""
    service_account: str = ""

    def __str__(self) -> str:
        if self.namespace:
            return f"service account {self.namespace}/{self.service_account} (uid {self.uid})"
        return f"uid {self.uid}"


class Identity(Protocol):
    """Tells which domain a process uses. Called in the event loop.

    Attributes:
        decided: how often `choose_domain` came to each of OUTCOMES.
    """

    decided: Counter[str]

    def domain(self, caller: Caller, wanted: str) -> str:
        """The domain `wanted`, or with an empty one the process's own.

        Raises:
            DeniedError: it may not use it.
        """

    def present(self, caller: Caller, token: bytes) -> Coroutine[None, None, None] | None:
        """The process shows a token. What to await before its next message; None: nothing."""

    def forget(self, caller: Caller) -> None:
        """The connection has ended."""

    async def close(self) -> None:
        """Release everything."""


def choose_domain(identity: Identity, caller: Caller, wanted: str) -> str:
    """The domain for an arena that a process opens in `wanted`.

    Raises:
        DeniedError: it may not.
    """
    if not wanted and caller.version < _SILENT_VERSION:
        raise DeniedError(errno.EINVAL, "an arena needs a domain in this version of the protocol")
    try:
        domain = identity.domain(caller, wanted)
    except DeniedError as denied:
        identity.decided["unknown" if denied.args[0] == errno.EAGAIN else "denied"] += 1
        raise
    identity.decided["allowed"] += 1
    return domain


class SocketIdentity:
    """Whoever reaches the socket names its domain."""

    def __init__(self) -> None:
        self.decided: Counter[str] = Counter()

    def domain(self, caller: Caller, wanted: str) -> str:
        """See Identity."""
        return wanted or DEFAULT_DOMAIN

    def present(self, caller: Caller, token: bytes) -> None:
        """Tokens are not asked for, and not looked at."""

    def forget(self, caller: Caller) -> None:
        """Nothing is remembered."""

    async def close(self) -> None:
        """Nothing to release."""
