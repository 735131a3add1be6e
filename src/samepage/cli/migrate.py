"""`samepage migrate`: move an arena to another host, while its writers go on."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from samepage.cli import places
from samepage.cli.clone import NameOption, SourceArgument, ToOption
from samepage.cli.output import DirectoryOption, JsonOption
from samepage.cli.transfer import Responses, Stub, print_transferred, split, transfer
from samepage.client import DEFAULT_DOMAIN
from samepage.errors import InvalidArgumentError
from samepage.v1 import arenas_pb2

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s)", re.ASCII)
_FREEZE_MS_MAX = 60_000


def migrate(
    source: SourceArgument,
    to: ToOption,
    name: NameOption = "",
    domain: Annotated[str, typer.Option(help="The arena's domain.")] = DEFAULT_DOMAIN,
    max_freeze: Annotated[
        str, typer.Option(help='How long writers may have to wait at the end: "500ms", "2s".')
    ] = "500ms",
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Move an arena to another host, whose helper holds it from then on (docs/arenas-api.md).

    Its writers go on meanwhile, but for a short freeze at the end. Whoever had it gets errors then.
    If anything fails, the arena stays where it was.
    """
    host, arena = split(source)
    request = arenas_pb2.MigrateArenaRequest(
        domain=domain,
        source_host=host,
        source_arena=arena,
        arena=name,
        max_freeze_milliseconds=_milliseconds(max_freeze),
    )

    def call(stub: Stub) -> Responses:
        return stub.MigrateArena(request)

    hosts = places.find(directory).hosts
    print_transferred(transfer(hosts, source, to, call, quiet=json), json)


def _milliseconds(text: str) -> int:
    match = _DURATION.fullmatch(text.strip())
    count = round(float(match[1]) * (1000 if match[2] == "s" else 1)) if match else 0
    if not 1 <= count <= _FREEZE_MS_MAX:
        raise InvalidArgumentError(
            f'--max-freeze {text!r} is no time: write "500ms" or "2s", 1 ms to 60 s'
        )
    return count
