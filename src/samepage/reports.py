"""What the client tells: plain values, in pages of 4096 bytes unless a name says bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class ShareReport:
    """What one `Arena.share()` did to the pages of the arena. Everything in pages.

    Attributes:
        merged: newly mapped to a shared page, or, all zero, given back to the kernel.
        differs: written between the look and the compare, so not equal any more.
        pinned: pinned for I/O (O_DIRECT, io_uring, RDMA); a later share() may merge them.
        absent: never touched, or discarded.
        busy: the kernel or the agent was too busy; a later share() may merge them.
        no_mapping: the process is at its limit of mappings (vm.max_map_count).
        unsupported: the kernel lacks what it takes; `samepage doctor` says what.
        unique: no equal page on this host.
        shared: mapped to a shared page now, those from before included.
        pages: all pages of the arena.
        no_headroom: not merged, since undoing that might not fit into the host's memory.
    """

    merged: int
    differs: int
    pinned: int
    absent: int
    busy: int
    no_mapping: int
    unsupported: int
    unique: int
    shared: int
    pages: int
    no_headroom: int


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """The pages of an arena now, as the kernel shows them.

    Attributes:
        pages: all pages; the sum of the next four.
        private: this arena's own.
        shared: mapped to a shared page.
        absent: never written, or discarded: they take no memory and read as zero.
        evicted: not on this host at the moment; a touch brings them back, or, where bytes are
            lost, is an error.
        saved_bytes: what sharing saves this arena: for each shared page
            4096 * (1 - 1/sharers) bytes. 0 when the merger is away.
    """

    pages: int
    private: int
    shared: int
    absent: int
    evicted: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class EvictReport:
    """What one `Arena.evict()` did to the pages of the range. Everything in pages.

    Attributes:
        held_elsewhere: gone: other hosts hold them.
        spilled: gone: they are on this host's disk.
        kept: here still: written meanwhile, pinned, or absent.
        no_room: here still: no host holds them, and no disk has room.
    """

    held_elsewhere: int
    spilled: int
    kept: int
    no_room: int


@dataclass(frozen=True, slots=True)
class CloneProgress:
    """How far a clone is; the sum is the arena's bytes that are not just zeros.

    Attributes:
        local_bytes: found on this host.
        fetched_bytes: come from other hosts.
        missing_bytes: to come.
        freeze_us: microseconds that writers at the source had to wait, at the end of a migration;
            what they wrote meanwhile is counted in `local_bytes` and `fetched_bytes` too.
    """

    local_bytes: int
    fetched_bytes: int
    missing_bytes: int
    freeze_us: int = 0


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """An arena of this host, of whichever process, by the merger's books.

    Attributes:
        name: unique in its domain on its host.
        domain: who may share with it.
        pid: the process that owns it, as the merger sees it; 0 when it cannot.
        pages: all pages.
        shared_pages: pages mapped to a shared page.
        saved_bytes: what sharing saves it: for each shared page 4096 * (1 - 1/sharers) bytes.
    """

    name: str
    domain: str
    pid: int
    pages: int
    shared_pages: int
    saved_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return self.pages * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class NodeStats:
    """What the merger of this host has done and holds.

    Attributes:
        node: the host's name.
        agents: processes connected.
        arenas: open arenas.
        shared_pages: arena pages mapped to a shared page.
        slots: pages of the store that are in use.
        store_bytes: memory that the store takes.
        saved_bytes: (shared_pages - slots) * 4096.
        merged_total: pages merged since the merger started.
        restored_total: pages made private again since then.
        cpu_seconds: user and system CPU time that the merger has used, in seconds.
        older_agents: processes whose library speaks an older version of the agent protocol.
        away_pages: arena pages that are on other hosts, or in the spill files.
        held_elsewhere: of them, by digest, those that other hosts hold for this one.
        spilled: pages in the spill files.
        spill_bytes: what the spill files take on disk.
        held_for_others: pages that this host holds for other hosts.
        evicted_total, returned_total, lost_total: pages that left, came back, and are lost, since
            the merger started.
    """

    node: str
    agents: int
    arenas: int
    shared_pages: int
    slots: int
    store_bytes: int
    saved_bytes: int
    merged_total: int
    restored_total: int
    cpu_seconds: float
    older_agents: int = 0
    away_pages: int = 0
    held_elsewhere: int = 0
    spilled: int = 0
    spill_bytes: int = 0
    held_for_others: int = 0
    evicted_total: int = 0
    returned_total: int = 0
    lost_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whose memory it is: what some arenas take, and what sharing saves them (docs/accounts.md).

    Accounts add up: each number of a whole is exactly the sum of its parts'.

    Attributes:
        pages: all pages; the sum of the next four.
        private_pages: the arenas' own, in memory or in swap.
        shared_pages: mapped to a shared page.
        absent_pages: never written, or discarded, or given back for being zero: they take no
            memory.
        unknown_pages: not shared, and the process does not say more: it is stopped, gone, or uses
            an older library.
        proportional_bytes: their part of the shared pages' memory: each shared page is split
            evenly among those that map it, to the byte.
        saved_bytes: shared_pages * 4096 - proportional_bytes.
    """

    pages: int = 0
    private_pages: int = 0
    shared_pages: int = 0
    absent_pages: int = 0
    unknown_pages: int = 0
    proportional_bytes: int = 0
    saved_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """What they take: private pages and their part of shared ones, as the kernel's Pss."""
        return self.private_pages * PAGE_SIZE + self.proportional_bytes


ACCOUNT_FIELDS = tuple(Account.__dataclass_fields__)


def total(accounts: Iterable[Account]) -> dict[str, int]:
    """Return the sums of accounts, by field of Account."""
    sums = dict.fromkeys(ACCOUNT_FIELDS, 0)
    for account in accounts:
        for name in ACCOUNT_FIELDS:
            sums[name] += getattr(account, name)
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaAccount(Account):
    """The account of one arena.

    Attributes:
        name: unique in its domain on its host, but for one whose process just went.
        domain: who may share with it.
        agent: its process's connection, 32 hex digits.
        pid: its process, as the merger sees it; 0 when it cannot, or when the process is away.
        command: that process's name; empty when the merger cannot see it.
    """

    name: str
    domain: str
    agent: str
    pid: int
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessAccount(Account):
    """The account of one process: of its arenas, in whichever domains.

    Attributes:
        pid: as the merger sees it; 0 when it cannot (another pid namespace).
        agent: where pid is 0, the connection that stands for the process, 32 hex digits.
        command: the process's name; empty when the merger cannot see it.
        arenas: how many it has.
    """

    pid: int
    agent: str
    command: str
    arenas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainAccount(Account):
    """The account of one domain on a host.

    Attributes:
        name: empty when only its store is known, from before the merger's start.
        arenas: how many it has.
        store_bytes: memory (or swap) that its shared pages take.
        unattributed_bytes: store_bytes - proportional_bytes: shared pages that are being made or
            freed, or that arenas map which have not announced themselves yet. 0 at rest.
    """

    name: str
    arenas: int
    store_bytes: int
    unattributed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAccount(Account):
    """The account of a host.

    Attributes:
        node: the host's name.
        store_bytes, unattributed_bytes: the sums of its domains'.
        domains, processes, arenas: its parts; each of the three adds up to the host.
    """

    node: str
    store_bytes: int
    unattributed_bytes: int
    domains: tuple[DomainAccount, ...]
    processes: tuple[ProcessAccount, ...]
    arenas: tuple[ArenaAccount, ...]
