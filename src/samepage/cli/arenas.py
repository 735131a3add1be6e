"""`samepage arenas`: whose memory is shared."""

from __future__ import annotations

import dataclasses

from samepage import host as merger
from samepage.cli import places
from samepage.cli.output import (
    DirectoryOption,
    DomainOption,
    JsonOption,
    print_json,
    print_table,
)
from samepage.sizes import format_size


def arenas(
    directory: DirectoryOption = None, domain: DomainOption = None, json: JsonOption = False
) -> None:
    """List the arenas of each host, by domain and name."""
    found = [
        (host, arena)
        for host in places.find(directory).hosts
        for arena in merger.list_arenas(str(host.directory))
        if domain is None or arena.domain == domain
    ]
    if json:
        print_json([{"host": host.name, **dataclasses.asdict(arena)} for host, arena in found])
        return
    print_table(
        ["host", "domain", "arena", ">process", ">size", ">shared", ">saved"],
        [
            (
                host.name or str(host.directory),
                arena.domain,
                arena.name,
                str(arena.pid or "-"),
                format_size(arena.size),
                f"{arena.shared_pages / arena.pages:.0%}" if arena.pages else "-",
                format_size(arena.saved_bytes),
            )
            for host, arena in found
        ],
    )
