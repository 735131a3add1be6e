"""`samepage clone`: copy an arena to another host, moving only the pages that it lacks."""

from __future__ import annotations

from typing import Annotated

import typer

from samepage.cli import places
from samepage.cli.output import DirectoryOption, JsonOption
from samepage.cli.transfer import Responses, Stub, print_transferred, split, transfer
from samepage.client import DEFAULT_DOMAIN
from samepage.v1 import arenas_pb2

SourceArgument = Annotated[str, typer.Argument(metavar="HOST/ARENA", help="Which arena.")]
ToOption = Annotated[str, typer.Option("--to", help="The host that gets it.")]
NameOption = Annotated[str, typer.Option(help="Its name there. Default: the same.")]


def clone(
    source: SourceArgument,
    to: ToOption,
    name: NameOption = "",
    domain: Annotated[str, typer.Option(help="The arena's domain.")] = DEFAULT_DOMAIN,
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Return at once; pages come when they are touched.")
    ] = False,
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Copy an arena to another host. Its helper holds the copy (docs/arenas-api.md)."""
    host, arena = split(source)
    request = arenas_pb2.CloneArenaRequest(
        domain=domain, source_host=host, source_arena=arena, arena=name, lazy=lazy
    )

    def call(stub: Stub) -> Responses:
        return stub.CloneArena(request)

    hosts = places.find(directory).hosts
    print_transferred(transfer(hosts, source, to, call, quiet=json), json)
