"""`samepage share`: have equal pages merged now."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, messages, print_json, print_table
from samepage.client import DEFAULT_DOMAIN
from samepage.errors import InvalidArgumentError, NotFoundError
from samepage.reports import ShareReport


def share(
    arena: Annotated[
        str, typer.Argument(help="The arena's name, or host/name. Default: all of the domain.")
    ] = "",
    domain: Annotated[str, typer.Option(help="The arena's domain.")] = DEFAULT_DOMAIN,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each host.")] = 60.0,
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Look for equal pages now, and merge them, instead of waiting for the next pass."""
    if not timeout > 0:
        raise InvalidArgumentError(f"--timeout {timeout} must be more than 0 seconds")
    hosts, name = _choose(places.find(directory).hosts, arena)
    reports = []
    for host in hosts:
        with messages.status(f"sharing on {host.name or host.directory}"):
            report = _share(host, domain, name, timeout, len(hosts) > 1)
        if report is not None:
            reports.append((host, report))
    if not reports:
        raise NotFoundError(f"there is no arena {name!r} in the domain {domain!r} on any host")
    if json:
        print_json([{"host": host.name, **dataclasses.asdict(report)} for host, report in reports])
        return
    fields = [field.name for field in dataclasses.fields(ShareReport)]
    print_table(
        ["pages", *(f">{host.name or host.directory}" for host, _ in reports)],
        [
            (name.replace("_", " "), *(getattr(report, name) for _, report in reports))
            for name in fields
        ],
    )


def _choose(hosts: tuple[places.Host, ...], arena: str) -> tuple[list[places.Host], str]:
    """Return the hosts to ask, and the arena's name on them.

    Raises:
        NotFoundError: there is no host of that name.
    """
    wanted, _, name = arena.rpartition("/")
    return places.named(hosts, wanted), name


def _share(
    host: places.Host, domain: str, name: str, timeout: float, optional: bool
) -> ShareReport | None:
    """Share on one host; None when the arena need not be there and is not."""
    try:
        return daemons.share(host, domain, name, timeout)
    except NotFoundError:
        if not optional:
            raise
        return None
