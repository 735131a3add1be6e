"""A snapshot as tables that fit a terminal: what saves most first, the rest only counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from samepage.cli.top.snapshot import HostSnapshot, Snapshot
from samepage.reports import PAGE_SIZE, Account, ProcessAccount
from samepage.sizes import format_size

_WIDE = 90
_ABOVE_ROWS = 2
_AGENT_DIGITS = 8


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: the plural of what a row is about.
        columns: ">" in front: to the right; "?": only where there is room.
        rows: what saves most first.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Screen:
    """A snapshot, cut to the height and width of whatever it is printed on.

    Args:
        limited: whether the height limits it.
    """

    def __init__(self, snapshot: Snapshot, domain: str | None, limited: bool) -> None:
        self._headline = _headline(snapshot)
        self._problems = snapshot.problems
        self._sections = sections(snapshot, domain)
        self._limited = limited

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        counts = [len(section.rows) for section in self._sections]
        if self._limited:
            lines = options.size.height - 1 - len(self._problems)
            counts = fit(counts, lines)
        yield Text(self._headline, style="bold", no_wrap=True, overflow="ellipsis")
        for problem in self._problems:
            yield Text(f"away: {problem}", style="red", no_wrap=True, overflow="ellipsis")
        for section, count in zip(self._sections, counts, strict=True):
            if count:
                total = len(section.rows)
                told = f"{section.title}: {count} of {total}" if count < total else section.title
                yield Text(told, style="dim", no_wrap=True, overflow="ellipsis")
                yield _table(section, count, options.max_width >= _WIDE)


def fit(counts: Sequence[int], lines: int) -> list[int]:
    """Return how many rows of each table to show within so many lines.

    The first tables come first when there is no room for a row of each; then all grow alike.
    """
    shown = [0] * len(counts)
    for number, count in enumerate(counts):
        if count and lines > _ABOVE_ROWS:
            shown[number] = 1
            lines -= _ABOVE_ROWS + 1
    while lines > 0:
        short = [number for number, rows in enumerate(shown) if 0 < rows < counts[number]]
        if not short:
            break
        for number in short[:lines]:
            shown[number] += 1
        lines -= len(short[:lines])
    return shown


def sections(snapshot: Snapshot, domain: str | None) -> list[Section]:
    """Return the tables, of one domain or all, the most important first."""
    hosts = [host for host in snapshot.hosts if host.account is not None]
    several = len(snapshot.hosts) > 1
    found = [
        _hosts(hosts) if domain is None else None,
        _processes(hosts, several) if domain is None else None,
        _arenas(hosts, several, domain),
        _domains(hosts, several, domain),
    ]
    return [section for section in found if section is not None]


_NUMBERS = (">size", ">?private", ">?shared", ">memory", ">saved")


def _numbers(account: Account) -> tuple[str, ...]:
    return (
        format_size(account.pages * PAGE_SIZE),
        format_size(account.private_pages * PAGE_SIZE),
        format_size(account.shared_pages * PAGE_SIZE),
        format_size(account.memory_bytes) + ("+?" if account.unknown_pages else ""),
        format_size(account.saved_bytes),
    )


def _hosts(hosts: Sequence[HostSnapshot]) -> Section:
    columns = ("host", ">?agents", ">arenas", *_NUMBERS, ">?swaps/s", ">?restores/s", ">?cpu")
    rows = [
        (
            host.name,
            "-" if host.merger is None else str(host.merger.agents),
            str(len(host.account.arenas)),
            *_numbers(host.account),
            "-" if host.swaps is None else f"{host.swaps:,.0f}",
            "-" if host.restores is None else f"{host.restores:,.0f}",
            "-" if host.scanner is None else f"{host.scanner.background_cpu_percent:.1f} %",
        )
        for host in hosts
        if host.account is not None
    ]
    return Section("hosts", columns, rows)


def _domains(hosts: Sequence[HostSnapshot], several: bool, domain: str | None) -> Section:
    found = [
        (host.name, account)
        for host in hosts
        if host.account is not None
        for account in host.account.domains
        if domain in (None, account.name)
    ]
    found.sort(key=lambda pair: (*_order(pair[1]), pair[1].name))
    rows = [
        (
            *_host(name, several),
            account.name or "(unknown)",
            str(account.arenas),
            *_numbers(account),
        )
        for name, account in found
    ]
    return Section("domains", (*_host("host", several), "domain", ">arenas", *_NUMBERS), rows)


def _processes(hosts: Sequence[HostSnapshot], several: bool) -> Section:
    found = [
        (host.name, account)
        for host in hosts
        if host.account is not None
        for account in host.account.processes
    ]
    found.sort(key=lambda pair: (*_order(pair[1]), pair[1].pid))
    rows = [
        (
            *_host(name, several),
            _pid(account),
            account.command or "-",
            str(account.arenas),
            *_numbers(account),
        )
        for name, account in found
    ]
    columns = (*_host("host", several), ">process", "command", ">arenas", *_NUMBERS)
    return Section("processes", columns, rows)


def _arenas(hosts: Sequence[HostSnapshot], several: bool, domain: str | None) -> Section:
    found = [
        (host.name, account)
        for host in hosts
        if host.account is not None
        for account in host.account.arenas
        if domain in (None, account.domain)
    ]
    found.sort(key=lambda pair: (*_order(pair[1]), pair[1].domain, pair[1].name))
    rows = [
        (
            *_host(name, several),
            account.domain,
            account.name,
            str(account.pid or "-"),
            *_numbers(account),
        )
        for name, account in found
    ]
    columns = (*_host("host", several), "domain", "arena", ">process", *_NUMBERS)
    return Section("arenas", columns, rows)


def _host(name: str, several: bool) -> tuple[str, ...]:
    return (name,) if several else ()


def _pid(process: ProcessAccount) -> str:
    return str(process.pid) if process.pid else f"agent {process.agent[:_AGENT_DIGITS]}"


def _order(account: Account) -> tuple[int, int]:
    return -account.saved_bytes, -account.memory_bytes


def _headline(snapshot: Snapshot) -> str:
    accounts = [host.account for host in snapshot.hosts if host.account is not None]
    saved = sum(account.saved_bytes for account in accounts)
    store = sum(account.store_bytes for account in accounts)
    memory = sum(account.memory_bytes for account in accounts)
    return (
        f"samepage {snapshot.time.astimezone():%H:%M:%S}  saved {format_size(saved)}  "
        f"memory {format_size(memory)}  store {format_size(store)}"
    )


def _table(section: Section, count: int, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="reverse", expand=False)
    shown = [wide or "?" not in column for column in section.columns]
    for column, show in zip(section.columns, shown, strict=True):
        if show:
            right = ">" in column
            table.add_column(
                Text(column.strip(">?")), justify="right" if right else "left", no_wrap=True
            )
    for row in section.rows[:count]:
        table.add_row(*(Text(cell) for cell, show in zip(row, shown, strict=True) if show))
    return table
