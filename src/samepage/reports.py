"""What the client tells: plain values, in pages of 4096 bytes unless a name says bytes."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """The pages of an arena now, as the kernel shows them.

    Attributes:
        pages: all pages; the sum of the next four.
        private: this arena's own.
        shared: mapped to a shared page.
        absent: never touched, or discarded: they take no memory and read as zero.
        evicted: not on this host at the moment; a touch brings them back.
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
