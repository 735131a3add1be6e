"""`samepage forget-host`: an operator's word that a host is gone for good."""

from __future__ import annotations

from typing import Annotated

import typer

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, console, print_json


def forget_host(
    host: Annotated[str, typer.Argument(help="The host that is gone, by its name.")],
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Tell the other hosts that one is gone for good, and all processes that ran there.

    Arenas that were just migrating from it, and wait for its word, belong to their new hosts then.
    Said of a host that only cannot be reached, it makes two owners of such an arena.
    """
    others = [each for each in places.find(directory).hosts if each.name != host]
    found = {each.name: daemons.forget_host(each, host) for each in others}
    if json:
        print_json({"hosts": found})
        return
    for name, arenas in found.items():
        console.print(f"{name}: {arenas} arenas of {host} are its own now", highlight=False)
