"""The public API's types, for mypy --strict; never run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import samepage


def connecting() -> None:
    assert_type(samepage.connect(), samepage.Node)
    assert_type(samepage.connect(dir="/run/samepage"), samepage.Node)
    assert_type(samepage.connect(Path("/run/samepage")), samepage.Node)
    samepage.connect(7)  # type: ignore[arg-type]


def nodes(node: samepage.Node) -> None:
    with node as entered:
        assert_type(entered, samepage.Node)
    assert_type(node.dir, str)
    assert_type(node.closed, bool)
    assert_type(node.create_arena("a", 4096), samepage.Arena)
    assert_type(node.create_arena("a", size="512MiB", domain=None), samepage.Arena)
    assert_type(node.create_arena("a", size=4096, domain="team"), samepage.Arena)
    node.create_arena("a", size=1.5)  # type: ignore[arg-type]
    node.create_arena("a")  # type: ignore[call-arg]
    assert_type(node.arenas(), list[samepage.ArenaInfo])
    assert_type(node.stats(), samepage.NodeStats)
    assert_type(node.account(), samepage.HostAccount)


def arenas(arena: samepage.Arena) -> None:
    with arena as entered:
        assert_type(entered, samepage.Arena)
    assert_type(arena.name, str)
    assert_type(arena.domain, str)
    assert_type(arena.size, int)
    assert_type(arena.closed, bool)
    assert_type(arena.buffer, memoryview)
    assert_type(arena.share(), samepage.ShareReport)
    assert_type(arena.share(timeout=1), samepage.ShareReport)
    assert_type(arena.stats(), samepage.ArenaStats)
    arena.name = "other"  # type: ignore[misc]


def values(
    report: samepage.ShareReport,
    stats: samepage.ArenaStats,
    info: samepage.ArenaInfo,
    node: samepage.NodeStats,
) -> None:
    assert_type(report.merged, int)
    assert_type(report.no_mapping, int)
    assert_type(stats.saved_bytes, int)
    assert_type(info.pid, int)
    assert_type(info.size, int)
    assert_type(node.cpu_seconds, float)
    assert_type(node.older_agents, int)
    report.merged = 1  # type: ignore[misc]


def errors() -> None:
    taken: type[samepage.SamepageError] = samepage.NameTakenError
    timeout: type[TimeoutError] = samepage.ShareTimeoutError
    away: type[ConnectionError] = samepage.NotRunningError
    assert_type([taken, timeout, away], list[type[Exception]])


def accounts(host: samepage.HostAccount) -> None:
    assert_type(host.arenas, tuple[samepage.ArenaAccount, ...])
    assert_type(host.processes, tuple[samepage.ProcessAccount, ...])
    assert_type(host.domains, tuple[samepage.DomainAccount, ...])
    assert_type(host.memory_bytes, int)
    parts: list[samepage.Account] = [host, *host.arenas, *host.processes, *host.domains]
    assert_type(parts[0].saved_bytes, int)
    host.saved_bytes = 1  # type: ignore[misc]
