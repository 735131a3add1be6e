"""`python -m bench`: run the measurements, print JSON lines, then a table on standard error."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from bench import index, ksm
from bench.record import Record


def table(records: list[Record]) -> Table:
    """The figures for people."""
    made = Table("what", "peer", "peer's", "ours", "ours / peer's", "unit")
    for record in records:
        peer = "-" if record.peer is None else f"{record.peer:.3f}"
        ratio = "-" if record.ratio is None else f"{record.ratio:.2f}"
        made.add_row(record.what, record.peer_name, peer, f"{record.ours:.3f}", ratio, record.unit)
    return made


def measured(what: str, size: int, runs: int, run_pages: list[int], pages: int) -> Iterator[Record]:
    """Run the measurements asked for."""
    if what in ("all", "ksm"):
        for run in run_pages:
            yield from asyncio.run(ksm.measure(size, run, runs, dict(os.environ)))
    if what in ("all", "index"):
        yield from index.measure_all(pages)


def main(
    what: Annotated[
        Literal["all", "ksm", "index"], typer.Argument(help="What to measure.")
    ] = "all",
    size_mib: Annotated[int, typer.Option(min=1, help="Size of each copy, MiB.")] = 512,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each side, alternating.")] = 5,
    run_pages: Annotated[
        list[int] | None,
        typer.Option(help="Equal pages between pages of one's own; 0: all equal. Repeatable."),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="Fingerprints for the index.")] = 1_000_000,
) -> None:
    """Measure side by side with kernel samepage merging, and with plain Redis."""
    records = []
    for record in measured(what, size_mib << 20, runs, run_pages or [0, 64], pages):
        print(record.line(), flush=True)
        records.append(record)
    Console(stderr=True).print(table(records))


if __name__ == "__main__":
    typer.run(main)
