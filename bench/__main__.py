"""`python -m bench`: run the measurements, print JSON lines, then a table on standard error."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import ksm
from bench.record import Record


def table(records: list[Record]) -> Table:
    """The figures for people."""
    made = Table("what", "peer", "peer's", "ours", "ours / peer's", "unit")
    for record in records:
        peer = "-" if record.peer is None else f"{record.peer:.3f}"
        ratio = "-" if record.ratio is None else f"{record.ratio:.2f}"
        made.add_row(record.what, record.peer_name, peer, f"{record.ours:.3f}", ratio, record.unit)
    return made


def main(
    size_mib: Annotated[int, typer.Option(help="Size of each copy, MiB.")] = 512,
    runs: Annotated[int, typer.Option(help="Runs of each side, alternating.")] = 5,
    run_pages: Annotated[
        list[int] | None,
        typer.Option(help="Equal pages between pages of one's own; 0: all equal. Repeatable."),
    ] = None,
) -> None:
    """Measure against kernel samepage merging, in the same run."""
    records: list[Record] = []
    for run in run_pages if run_pages else [0, 64]:
        found = asyncio.run(ksm.measure(size_mib << 20, run, runs, dict(os.environ)))
        for record in found:
            print(record.line(), flush=True)
        records += found
    Console(stderr=True).print(table(records))


if __name__ == "__main__":
    typer.run(main)
