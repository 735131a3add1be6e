"""Accounts: whose the memory is, by arena, process, domain and host. Sums are exact.

Method. All numbers are integers. The 4096 bytes of a slot with n references are split among the
pages that map it: each gets 4096 // n bytes, and the 4096 % n bytes that are left go, one each, to
some of them. Which ones is decided by rank: the pages are numbered 0 to n - 1 in the order of their
arenas (by name, agent and number), and rank j gets one when (j + slot) % n < 4096 % n. So a slot's
parts add up to 4096 whatever n is, the same books give the same parts, and over many slots no arena
gets more than its share, since the ranks' luck turns with the slot's number.

What the books cannot know, each arena's agent is asked for: how many pages take no memory. Pages
that are neither shared nor that are private. Where no agent answers they are unknown, not guessed.

Slots are never shared across domains, so each domain is looked at in one instant, and the work on
it is then done in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import PAGE_SIZE
from samepage.reports import ArenaAccount, DomainAccount, HostAccount, ProcessAccount, total
from samepage_merger.arena import Arena, Session
from samepage_merger.domains import Domain, Domains
from samepage_merger.orders import Orders
from samepage_merger.runs import Int64s, unique_counts


class Accountant:
    """Makes accounts.

    Args:
        node: the host's name.
    """

    def __init__(self, node: str, domains: Domains, orders: Orders) -> None:
        self._node = node
        self._domains = domains
        self._orders = orders

    async def host(self) -> HostAccount:
        """Return the host's account with all its parts."""
        absent = await self._ask_absent()
        domains, arenas = [], []
        for domain in list(self._domains):
            store_bytes = domain.store.resident_bytes()
            of_domain = [
                _arena_account(share, absent.get(share.arena)) for share in await split(domain)
            ]
            sums = total(of_domain)
            arenas += of_domain
            domains.append(
                DomainAccount(
                    **sums,
                    name=domain.name,
                    arenas=len(of_domain),
                    store_bytes=store_bytes,
                    unattributed_bytes=store_bytes - sums["proportional_bytes"],
                )
            )
        return HostAccount(
            **total(arenas),
            node=self._node,
            store_bytes=sum(domain.store_bytes for domain in domains),
            unattributed_bytes=sum(domain.unattributed_bytes for domain in domains),
            domains=tuple(sorted(domains, key=lambda domain: domain.name)),
            processes=tuple(by_process(arenas)),
            arenas=tuple(sorted(arenas, key=lambda arena: (arena.domain, arena.name))),
        )

    async def _ask_absent(self) -> dict[Arena, int]:
        """Pages that take no memory, of the arenas whose agents say it."""
        by_session: dict[Session, list[Arena]] = {}
        for domain in self._domains:
            for arena in domain.arenas:
                if arena.session is not None:
                    by_session.setdefault(arena.session, []).append(arena)
        absent: dict[Arena, int] = {}

        async def ask(arenas: Collection[Arena]) -> None:
            for arena in arenas:
                count = await self._orders.count_absent(arena)
                if count is not None:
                    absent[arena] = count

        await asyncio.gather(*map(ask, by_session.values()))
        return absent


@dataclass(frozen=True, slots=True)
class Share:
    """An arena's shared pages at one instant, and its part of their bytes.

    Attributes:
        pid: its process then; 0 when there is none, or none that the merger sees.
    """

    arena: Arena
    pid: int
    shared: int
    proportional_bytes: int

    @property
    def saved_bytes(self) -> int:
        """What sharing saves the arena."""
        return self.shared * PAGE_SIZE - self.proportional_bytes


async def split(domain: Domain) -> list[Share]:
    """Split a domain's slots among its arenas, as they are now."""
    arenas = sorted(domain.arenas, key=lambda arena: (arena.name, arena.agent, arena.number))
    pids = [arena.session.peer.pid if arena.session is not None else 0 for arena in arenas]
    mapped = [arena.map.mapped_slots() for arena in arenas]
    slots, references = domain.books.table.counts()
    parts = await asyncio.to_thread(split_slots, slots, references, mapped)
    return [
        Share(arena, pid, some.size, part)
        for arena, pid, some, part in zip(arenas, pids, mapped, parts, strict=True)
    ]


def split_slots(
    slots: Int64s,
    references: npt.NDArray[np.int32],
    mapped: Sequence[npt.NDArray[np.integer]],
) -> list[int]:
    """Return how many bytes of these slots (ascending) each arena gets.

    Args:
        references: of each slot, all arenas together.
        mapped: by arena, the slot of each of its shared pages; only slots that are given.
    """
    ranks = np.zeros(slots.size, np.int64)
    parts = []
    for some in mapped:
        at, pages = unique_counts(np.searchsorted(slots, some))
        sharers = references[at].astype(np.int64)
        whole = PAGE_SIZE // sharers
        first = ranks[at] + slots[at]
        rest = _rest(first + pages, sharers) - _rest(first, sharers)
        ranks[at] += pages
        parts.append(int((pages * whole + rest).sum()))
    return parts


def _rest(numbers: Int64s, sharers: Int64s) -> Int64s:
    """How many i in range(number) have i % sharers < 4096 % sharers."""
    rest = PAGE_SIZE % sharers
    count: Int64s = numbers // sharers * rest + np.minimum(numbers % sharers, rest)
    return count


def by_process(arenas: Iterable[ArenaAccount]) -> list[ProcessAccount]:
    """Return the accounts of the arenas' processes: by pid, by agent where there is none."""
    groups: dict[tuple[int, str], list[ArenaAccount]] = {}
    for arena in arenas:
        groups.setdefault((arena.pid, "" if arena.pid else arena.agent), []).append(arena)
    return [
        ProcessAccount(
            **total(group), pid=pid, agent=agent, command=group[0].command, arenas=len(group)
        )
        for (pid, agent), group in sorted(groups.items())
    ]


def _arena_account(share: Share, absent: int | None) -> ArenaAccount:
    arena = share.arena
    # A broken connection's arena may be announcing itself: what it mapped before is not counted.
    others = arena.pages - share.shared - arena.away.away
    known = absent is not None
    absent = min(absent or 0, others)
    return ArenaAccount(
        name=arena.name,
        domain=arena.domain.name,
        agent=arena.agent.hex(),
        pid=share.pid,
        command=command_of(share.pid),
        pages=arena.pages,
        private_pages=others - absent if known else 0,
        shared_pages=share.shared,
        absent_pages=absent,
        unknown_pages=0 if known else others,
        proportional_bytes=share.proportional_bytes,
        saved_bytes=share.saved_bytes,
    )


def command_of(pid: int) -> str:
    """Return the name of a process, as it gave it itself; empty where it cannot be seen."""
    if not pid:
        return ""
    try:
        name = Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return ""
    return "".join(
        c if c.isprintable() else "?" for c in name.decode(errors="replace").rstrip("\n")
    )
