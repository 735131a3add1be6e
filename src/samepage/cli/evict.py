"""`samepage evict`: have an arena's pages leave their host."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, messages, print_json, print_table
from samepage.client import DEFAULT_DOMAIN
from samepage.errors import NotFoundError


def evict(
    arena: Annotated[str, typer.Argument(help="The arena's name, or host/name.")],
    domain: Annotated[str, typer.Option(help="The arena's domain.")] = DEFAULT_DOMAIN,
    host: Annotated[str, typer.Option(help="Only the host of this name.")] = "",
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Let all pages of an arena leave the host's memory; each comes back when it is touched.

    Those that enough other hosts hold are only let go of; the rest goes to the spill files.
    """
    wanted, _, name = arena.rpartition("/")
    found = []
    for chosen in places.named(places.find(directory).hosts, host or wanted):
        with messages.status(f"evicting on {chosen.name or chosen.directory}"):
            try:
                found.append((chosen, daemons.evict(chosen, domain, name)))
            except NotFoundError:
                continue
    if not found:
        raise NotFoundError(f"there is no arena {name!r} in the domain {domain!r} on any host")
    if json:
        print_json([{"host": chosen.name, **dataclasses.asdict(gone)} for chosen, gone in found])
        return
    fields = [field.name for field in dataclasses.fields(daemons.Evicted)]
    print_table(
        ["pages", *(f">{chosen.name or chosen.directory}" for chosen, _ in found)],
        [(name.replace("_", " "), *(getattr(gone, name) for _, gone in found)) for name in fields],
    )
