"""What the daemons of all hosts say at one moment."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from samepage import host as merger
from samepage.cli import daemons
from samepage.cli.places import Host
from samepage.errors import NotRunningError, SamepageError
from samepage.reports import HostAccount, NodeStats


@dataclass(frozen=True)
class HostSnapshot:
    """One host; what does not answer is None.

    Attributes:
        swaps, restores: pages a second since the snapshot before; None in the first one.
    """

    host: Host
    account: HostAccount | None
    merger: NodeStats | None
    scanner: daemons.ScannerStats | None
    swaps: float | None = None
    restores: float | None = None

    @property
    def name(self) -> str:
        """The host's name, or its directory."""
        known = self.account or self.scanner
        return self.host.name or (known.node if known else str(self.host.directory))


@dataclass(frozen=True)
class Snapshot:
    """All hosts.

    Attributes:
        time: of it.
        taken: the same by the monotonic clock, in seconds.
        problems: why something is missing.
    """

    time: datetime.datetime
    taken: float
    hosts: tuple[HostSnapshot, ...]
    problems: tuple[str, ...]

    def to_json(self, domain: str | None) -> dict[str, Any]:
        """Return what `--json` prints; of arenas and domains only those of `domain`, if given."""
        return {
            "time": self.time.isoformat(timespec="milliseconds"),
            "hosts": [
                {
                    "name": host.name,
                    "dir": str(host.host.directory),
                    "account": _account(host.account, domain),
                    "scanner": dataclasses.asdict(host.scanner) if host.scanner else None,
                    "swaps_per_second": host.swaps,
                    "restores_per_second": host.restores,
                }
                for host in self.hosts
            ],
            "problems": list(self.problems),
        }


def take(hosts: Sequence[Host], before: Snapshot | None = None) -> Snapshot:
    """Ask the daemons of all hosts.

    Args:
        before: the last snapshot of the same hosts.

    Raises:
        NotRunningError: no merger answers, and none did before.
    """
    taken = time.monotonic()
    problems: list[str] = []
    found = tuple(_host(host, problems) for host in hosts)
    if before is not None:
        seconds = taken - before.taken
        found = tuple(
            _with_rates(now, then, seconds) for now, then in zip(found, before.hosts, strict=True)
        )
    elif not any(host.account for host in found):
        raise NotRunningError("; ".join(problems))
    now = datetime.datetime.now(datetime.UTC)
    return Snapshot(now, taken, found, tuple(problems))


def _account(account: HostAccount | None, domain: str | None) -> dict[str, Any] | None:
    if account is None:
        return None
    if domain is not None:
        arenas = tuple(arena for arena in account.arenas if arena.domain == domain)
        domains = tuple(one for one in account.domains if one.name == domain)
        account = dataclasses.replace(account, arenas=arenas, domains=domains)
    return dataclasses.asdict(account)


def _host(host: Host, problems: list[str]) -> HostSnapshot:
    account, stats, scanner = None, None, None
    directory = str(host.directory)
    try:
        account, stats = merger.host_account(directory), merger.node_stats(directory)
    except SamepageError as error:
        problems.append(str(error))
    try:
        scanner = daemons.scanner_stats(host)
    except SamepageError as error:
        problems.append(str(error))
    return HostSnapshot(host, account, stats, scanner)


def _with_rates(now: HostSnapshot, then: HostSnapshot, seconds: float) -> HostSnapshot:
    if now.merger is None or then.merger is None:
        return now
    # A merger that restarted counts from 0.
    swaps = max(now.merger.merged_total - then.merger.merged_total, 0) / seconds
    restores = max(now.merger.restored_total - then.merger.restored_total, 0) / seconds
    return dataclasses.replace(now, swaps=swaps, restores=restores)
