"""Who is who: which domains a process may use, and which is its own.

Theory. A domain is a matter of trust, so where processes are not all friends, the daemons decide
it from who a process is, and never from what it says: by its user and groups, which the kernel
tells of the other end of a socket (`uid`), or by a token that Kubernetes gave to its pod, which
the API server confirms (`token`). A policy file maps that to domains. A process may use several;
the first is its own, which it gets when it names none. `socket` is for hosts where whoever reaches
the socket is trusted: a process names its domain.

The merger and the scanner each decide for themselves, by the same settings. What cannot be decided
is refused: there is no domain of those who are unknown. docs/identity.md is for operators.
"""

from samepage.daemon.identity.base import (
    DeniedError,
    Identity,
    SocketIdentity,
    Subject,
    choose_domain,
)
from samepage.daemon.identity.settings import IdentitySettings, make_identity

__all__ = [
    "DeniedError",
    "Identity",
    "IdentitySettings",
    "SocketIdentity",
    "Subject",
    "choose_domain",
    "make_identity",
]
