"""`samepage status`: what the daemons say, host by host."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, messages, print_json, print_table
from samepage.errors import NotRunningError, SamepageError
from samepage.reports import PAGE_SIZE
from samepage.sizes import format_size

AWAY = "away"
REFUSED = "refused"
_SIZES = (">shared", ">store", ">saved", ">away")
_COLUMNS = ("host", "daemons", "index", ">arenas", *_SIZES, ">published")


def status(directory: DirectoryOption = None, json: JsonOption = False) -> None:
    """Show what each host shares and saves, and how its daemons are.

    Exits with 1 when one of them does not answer, or the index refuses a host; 3 when none answers.
    """
    cluster = places.find(directory)
    hosts = [daemons.host_status(host) for host in cluster.hosts]
    index, problems = _index(cluster.index)
    problems += [text for host in hosts for text in host.errors]
    if not any(host.merger or host.scanner for host in hosts):
        raise NotRunningError("; ".join(problems))
    refusals = [
        f"{_name(host)} is no part of the cluster: {host.scanner.index_refusal}"
        for host in hosts
        if host.scanner is not None and host.scanner.index_refusal
    ]
    if json:
        print_json(_to_json(hosts, index, problems + refusals))
    else:
        _show(hosts, index, [(AWAY, text) for text in problems] + [(REFUSED, t) for t in refusals])
    if problems or refusals:
        raise typer.Exit(1)


def _index(address: str) -> tuple[daemons.IndexStats | None, list[str]]:
    if not address:
        return None, []
    try:
        return daemons.index_stats(address), []
    except SamepageError as error:
        return None, [str(error)]


def _to_json(
    hosts: list[daemons.HostStatus], index: daemons.IndexStats | None, problems: list[str]
) -> dict[str, Any]:
    return {
        "hosts": [
            {
                "name": _name(host),
                "dir": str(host.host.directory),
                "merger": dataclasses.asdict(host.merger) if host.merger else None,
                "scanner": dataclasses.asdict(host.scanner) if host.scanner else None,
                "arenas": dataclasses.asdict(host.arenas) if host.arenas else None,
                "account": dataclasses.asdict(host.account) if host.account else None,
            }
            for host in hosts
        ],
        "index": dataclasses.asdict(index) if index else None,
        "problems": problems,
    }


def _name(host: daemons.HostStatus) -> str:
    known = host.merger or host.scanner
    return host.host.name or (known.node if known else "")


def _show(
    hosts: list[daemons.HostStatus],
    index: daemons.IndexStats | None,
    problems: list[tuple[str, str]],
) -> None:
    print_table(
        _COLUMNS,
        [_row(host) for host in hosts],
    )
    if index is not None:
        print_table(
            ["index on", ">hosts", ">fingerprints", ">entries", ">size"],
            [
                (
                    index.store,
                    index.hosts,
                    index.fingerprints,
                    index.entries,
                    format_size(index.stored_bytes),
                )
            ],
        )
    for host in hosts:
        if host.merger is not None and host.merger.older_agents:
            messages.print(
                f"{_name(host)}: {host.merger.older_agents} processes use an older library; "
                "they share as before, and get what is new when they are started anew",
                highlight=False,
            )
    for kind, problem in problems:
        messages.print(f"[red]{kind}:[/red] {problem}", highlight=False)


def _row(host: daemons.HostStatus) -> list[object]:
    merger, scanner = host.merger, host.scanner
    missing = [name for name, stats in (("merger", merger), ("scanner", scanner)) if stats is None]
    if host.arenas is None and daemons.has_arenas_service(host.host):
        missing.append("arenas")
    row: list[object] = [_name(host), f"{', '.join(missing)} {AWAY}" if missing else "serving"]
    row.append("-" if scanner is None else _index_connection(scanner))
    if merger is None:
        row += ["-"] * (1 + len(_SIZES))
    else:
        shared = merger.shared_pages * PAGE_SIZE
        row.append(merger.arenas)
        away = merger.away_pages * PAGE_SIZE
        sizes = (shared, merger.store_bytes, merger.saved_bytes, away)
        row += [format_size(size) for size in sizes]
    row.append("-" if scanner is None else scanner.published)
    return row


def _index_connection(scanner: daemons.ScannerStats) -> str:
    if scanner.index_refusal:
        return REFUSED
    return "connected" if scanner.index_connected else "not used"
