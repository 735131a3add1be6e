"""By the token of a Kubernetes service account.

A process shows its token before it opens arenas, and its next messages wait for the API server's
word. That is cached for a while, so that the merger and many processes of one pod ask once. What
the kernel says of the process must agree with the token: its pod, where its control group can be
seen (not from another pid namespace), and its user, where a rule of the policy asks for one.

Nobody is let in while the API server is away. Whoever was in stays in, since a process does not
change its pod. A connection without an admitted token ends after a while, so that the agent comes
back, reads its file again and shows what is there then.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import structlog

from samepage.daemon.identity.base import Caller, DeniedError, Subject
from samepage.daemon.identity.policy import Policy
from samepage.daemon.identity.reviews import Account, RefusedError, Reviewer, UnavailableError

_REVIEWS_AT_ONCE = 8
_CACHE_MAX = 4096
_REFUSED_SECONDS = 5.0
_AGAIN_SECONDS = 10.0
_TOKEN_MAX = 16384
_TOKEN_VERSION = 3
_NONE = (
    "this host wants to know who you are: set SAMEPAGE_TOKEN_FILE to the file with the token of a "
    "projected service-account volume (the webhook does, for pods with samepage.io/inject)"
)
_OLD = "this host wants a token, which this process's library does not know of: upgrade it"

log = structlog.get_logger(__name__)


class _Refusal(NamedTuple):
    error: int
    text: str


@dataclass(frozen=True)
class _Claim:
    """What a connection has shown, and what came of it."""

    digest: bytes
    verdict: Account | _Refusal


class _Cached(NamedTuple):
    verdict: Account | _Refusal
    until: float


class TokenIdentity:
    """See Identity.

    Args:
        policy: from namespaces, accounts and users to domains.
        reviewer: asks the API server.
        node: where pods must be; empty: anywhere.
        cache_seconds: how long a good answer counts.
    """

    def __init__(self, policy: Policy, reviewer: Reviewer, node: str, cache_seconds: float) -> None:
        self.decided: Counter[str] = Counter()
        self._policy = policy
        self._reviewer = reviewer
        self._node = node
        self._cache_seconds = cache_seconds
        self._cache: dict[bytes, _Cached] = {}
        self._claims: WeakKeyDictionary[Caller, _Claim] = WeakKeyDictionary()
        self._endings: WeakKeyDictionary[Caller, asyncio.TimerHandle] = WeakKeyDictionary()
        self._turn = asyncio.Semaphore(_REVIEWS_AT_ONCE)

    def domain(self, caller: Caller, wanted: str) -> str:
        """See Identity."""
        claim = self._claims.get(caller)
        if claim is None:
            self._end_later(caller)
            raise DeniedError(errno.EACCES, _NONE if caller.version >= _TOKEN_VERSION else _OLD)
        if isinstance(claim.verdict, _Refusal):
            raise DeniedError(*claim.verdict)
        account = claim.verdict
        subject = Subject(caller.uid, caller.gids, account.namespace, account.name)
        return self._policy.choose(subject, wanted)

    def present(self, caller: Caller, token: bytes) -> Coroutine[None, None, None] | None:
        """See Identity."""
        digest = hashlib.sha256(token).digest()
        claim = self._claims.get(caller)
        if claim is not None and claim.digest == digest and isinstance(claim.verdict, Account):
            return None
        return self._review(caller, token, digest)

    def forget(self, caller: Caller) -> None:
        """See Identity."""
        self._claims.pop(caller, None)
        if (ending := self._endings.pop(caller, None)) is not None:
            ending.cancel()

    async def close(self) -> None:
        """See Identity."""
        await self._reviewer.close()

    async def _review(self, caller: Caller, token: bytes, digest: bytes) -> None:
        verdict = await self._verdict(token, digest)
        if isinstance(verdict, Account):
            verdict = self._cross_check(caller, verdict)
        self._claims[caller] = _Claim(digest, verdict)
        if isinstance(verdict, _Refusal):
            log.warning("token refused", uid=caller.uid, pid=caller.pid, why=verdict.text)
            self._end_later(caller)

    async def _verdict(self, token: bytes, digest: bytes) -> Account | _Refusal:
        """The API server's word, or what it was not long ago."""
        if (cached := self._cached(digest)) is not None:
            return cached
        async with self._turn:
            # Another connection may have asked meanwhile.
            if (cached := self._cached(digest)) is not None:
                return cached
            seconds = self._cache_seconds
            verdict: Account | _Refusal
            try:
                if not token.isascii() or len(token) > _TOKEN_MAX:
                    raise RefusedError("what was shown is no token")
                verdict = await self._reviewer.review(token.decode())
            except UnavailableError as error:
                text = f"who this process is cannot be checked now: {error}; try again later"
                return _Refusal(errno.EAGAIN, text)
            except RefusedError as error:
                seconds = min(seconds, _REFUSED_SECONDS)
                verdict = _Refusal(errno.EACCES, f"{error}; see SAMEPAGE_TOKEN_FILE")
            if len(self._cache) >= _CACHE_MAX:
                self._cache.pop(next(iter(self._cache)))
            self._cache[digest] = _Cached(verdict, asyncio.get_running_loop().time() + seconds)
            return verdict

    def _cached(self, digest: bytes) -> Account | _Refusal | None:
        cached = self._cache.get(digest)
        if cached is None or cached.until <= asyncio.get_running_loop().time():
            return None
        return cached.verdict

    def _cross_check(self, caller: Caller, account: Account) -> Account | _Refusal:
        """Whether the process can be the one that the token was given to."""
        if self._node and account.node and account.node != self._node:
            text = f"the token is of a pod on the node {account.node}, and this is {self._node}"
            return _Refusal(errno.EACCES, text)
        # The two ways in which kubelets name control groups.
        names = (f"pod{account.pod_uid}", f"pod{account.pod_uid.replace('-', '_')}")
        if account.pod_uid and caller.in_control_group(*names) is False:
            text = "the token is another pod's: a process must show the one of its own pod"
            return _Refusal(errno.EACCES, text)
        return account

    def _end_later(self, caller: Caller) -> None:
        if caller not in self._endings:
            loop = asyncio.get_running_loop()
            self._endings[caller] = loop.call_later(_AGAIN_SECONDS, self._end, caller)

    def _end(self, caller: Caller) -> None:
        """Unless it has shown a better one meanwhile."""
        self._endings.pop(caller, None)
        claim = self._claims.get(caller)
        if claim is None or isinstance(claim.verdict, _Refusal):
            caller.close()
