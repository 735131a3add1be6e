"""`samepage forget-host`: an operator's word on arenas that wait for a host's."""

from __future__ import annotations

from typing import Annotated

import typer

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, console, print_json
from samepage.errors import NotRunningError, SamepageError, ServiceUnavailableError


def forget_host(
    host: Annotated[str, typer.Argument(help="The host that cannot tell, by its name.")],
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Tell the other hosts that one is gone for good, and all processes that ran there.

    Arenas that were just migrating from it, and wait for its word, belong to their new hosts then.
    Said of a host that only cannot be reached, it makes two owners of such an arena. Of a host that
    is in the cluster it is believed for arenas whose processes have ended, and of which the host
    has said that it lost what it knew: see first that no third host has taken them.
    """
    others = [each for each in places.find(directory).hosts if each.name != host]
    found = dict.fromkeys((each.name for each in others), 0)
    refused = None
    for each in others:
        try:
            found[each.name] = daemons.forget_host(each, host)
        except (NotRunningError, ServiceUnavailableError):
            raise
        except SamepageError as error:
            refused = error
    if refused is not None and not any(found.values()):
        raise refused
    if json:
        print_json({"hosts": found})
        return
    for name, arenas in found.items():
        console.print(f"{name}: {arenas} arenas of {host} are its own now", highlight=False)
