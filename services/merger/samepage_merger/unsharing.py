"""Makes every page of an arena private again, on an operator's order."""

from __future__ import annotations

import numpy as np

from samepage.daemon import secrets
from samepage.daemon.wire import Outcome
from samepage.errors import NotFoundError
from samepage_merger.arena import State
from samepage_merger.domains import Domains
from samepage_merger.orders import Orders


class Unsharer:
    """Orders agents to restore their pages."""

    def __init__(self, domains: Domains, orders: Orders) -> None:
        self._domains = domains
        self._orders = orders

    async def unshare(self, domain: str, name: str) -> int:
        """Return how many pages were restored; those shared meanwhile are not waited for.

        Raises:
            InvalidArgumentError: no domain can have that name.
            NotFoundError: there is no such arena, or its process is away.
            TimeoutError: the agent did not restore all of it.
        """
        secrets.check_domain(domain)
        arena = next(
            (a for a in self._domains.arenas() if (a.domain.name, a.name) == (domain, name)), None
        )
        if arena is None or arena.state is not State.OPEN:
            raise NotFoundError(f"there is no arena {name!r} in domain {domain!r} on this host")
        before = arena.restored
        outcomes = await self._orders.restore(arena, arena.map.mapped())
        if bool((outcomes == Outcome.BUSY).any()):
            raise TimeoutError(
                f"the process of arena {name!r} did not restore all of it: see whether it is"
                " stopped or out of memory, and ask again"
            )
        if bool(np.any(outcomes != Outcome.MERGED)):
            raise NotFoundError(f"arena {name!r} went away")
        return arena.restored - before
