"""`samepage overlap`: how much of each host's memory the other hosts have already."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from samepage.cli import daemons, places
from samepage.cli.output import DirectoryOption, JsonOption, messages, print_json, print_table
from samepage.errors import InvalidArgumentError, NotFoundError, SamepageError
from samepage.reports import PAGE_SIZE
from samepage.sizes import format_size

_PLOTS = (".png", ".svg")

#: A host's name, and what it shares with the others.
Row = tuple[str, daemons.Overlap]


def overlap(
    arena: Annotated[str, typer.Argument(help="Only this arena. Default: all memory.")] = "",
    domain: Annotated[
        str, typer.Option(help="The arena's domain. Default: default, or all of them.")
    ] = "",
    host: Annotated[str, typer.Option(help="Only of this host. Default: all of them.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map: a .png or .svg file.")] = None,
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Tell how many bytes of each host, or of an arena, every other host has too.

    That is what a clone or a migration to that host need not move, and where to place what is
    alike. Zero pages do not count, nor a page twice.
    """
    if plot is not None and plot.suffix not in _PLOTS:
        raise InvalidArgumentError(f"--plot {plot}: give a name that ends with .png or .svg")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise SamepageError("to draw takes matplotlib: pip install 'samepage[plot]'")
    rows = _ask(places.named(places.find(directory).hosts, host), domain, arena)
    if plot is not None:
        from samepage.cli import heatmap

        heatmap.draw(rows, _others(rows), plot)
        messages.print(f"drawn: {plot}", highlight=False)
    if json:
        print_json({"hosts": [_to_json(name, found) for name, found in rows]})
    else:
        _show(rows)


def _ask(hosts: Sequence[places.Host], domain: str, arena: str) -> list[Row]:
    """Ask every host; those that lack the arena are left out, unless all do."""
    rows: list[Row] = []
    missing: list[NotFoundError] = []
    for host in hosts:
        try:
            rows.append((_name(host), daemons.overlap(host, domain, arena)))
        except NotFoundError as error:
            missing.append(error)
    if not rows:
        raise missing[0]
    return rows


def _name(host: places.Host) -> str:
    return host.name or daemons.scanner_stats(host).node


def _others(rows: Sequence[Row]) -> list[str]:
    """The hosts that may have something, each once, by name."""
    return sorted({name for _, found in rows for name in found.hosts} | {name for name, _ in rows})


def _to_json(name: str, found: daemons.Overlap) -> dict[str, object]:
    return {
        "name": name,
        "distinct_bytes": found.distinct_pages * PAGE_SIZE,
        "overlap_bytes": {other: pages * PAGE_SIZE for other, pages in found.hosts.items()},
    }


def _show(rows: Sequence[Row]) -> None:
    others = _others(rows)
    print_table(
        ["of", ">distinct", *(f">on {other}" for other in others)],
        [
            (
                name,
                format_size(found.distinct_pages * PAGE_SIZE),
                *(_cell(name, found, other) for other in others),
            )
            for name, found in rows
        ],
    )


def _cell(name: str, found: daemons.Overlap, other: str) -> str:
    if name == other:
        return "-"
    pages = found.hosts.get(other, 0)
    share = pages / found.distinct_pages if found.distinct_pages else 0.0
    return f"{format_size(pages * PAGE_SIZE)} {share:.0%}"
