"""`python -m bench`: run the measurements, print JSON lines, then a table on standard error."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import fingerprint, hosts, index, ksm, memory, passes, running
from bench.record import Record, parse

RUN_PAGES = (0, 64, 1)
# Single pages take a mapping each, and an arena has a quarter of vm.max_map_count.
SINGLE_BYTES_MAX = 64 << 20
# All of it has to be published before it can be evicted.
FAULT_BYTES_MAX = 64 << 20


class What(StrEnum):
    """What can be measured by itself."""

    ALL = "all"
    FINGERPRINT = "fingerprint"
    KSM = "ksm"
    PASSES = "passes"
    MEMORY = "memory"
    WRITING = "writing"
    STALLS = "stalls"
    INDEX = "index"
    CLONES = "clones"
    FAULTS = "faults"


@dataclass(frozen=True)
class Sizes:
    """How much to measure with: bytes of each copy, runs of each side, fingerprints."""

    size: int
    runs: int
    run_pages: tuple[int, ...]
    pages: int


def measured(what: What, sizes: Sizes) -> Iterator[Record]:
    """Run the measurements asked for, in the order of the design's table."""
    size, runs = sizes.size, sizes.runs
    if what in (What.ALL, What.FINGERPRINT):
        yield from fingerprint.measure(size, runs)
    if what in (What.ALL, What.KSM):
        for run in sizes.run_pages:
            most = SINGLE_BYTES_MAX if run == 1 else size
            yield from asyncio.run(ksm.measure(min(size, most), run, runs))
    if what in (What.ALL, What.PASSES):
        yield from asyncio.run(passes.measure(size, runs))
    if what in (What.ALL, What.MEMORY):
        yield from asyncio.run(memory.measure(size, runs))
    if what in (What.ALL, What.WRITING):
        yield from asyncio.run(running.measure_writing(size, runs))
    if what in (What.ALL, What.STALLS):
        yield from asyncio.run(running.measure_stalls(size, runs))
    if what in (What.ALL, What.INDEX):
        yield from index.measure_all(sizes.pages)
    if what in (What.ALL, What.CLONES):
        yield from asyncio.run(hosts.measure_clones(size, runs))
    if what in (What.ALL, What.FAULTS):
        yield from asyncio.run(hosts.measure_faults(min(size, FAULT_BYTES_MAX), runs))


def table(records: Iterable[Record]) -> Table:
    """The figures for people."""
    made = Table("what", "peer", "peer's", "ours", "unit", "ours / peer's", "aim", "reached")
    for record in records:
        peer = "-" if record.peer is None else f"{record.peer:.3f}"
        ratio = "-" if record.ratio is None else f"{record.ratio:.2f}"
        reached = {None: "-", True: "[green]yes[/green]", False: "[red]no[/red]"}[record.reached]
        aim = "-" if record.aim is None else str(record.aim)
        made.add_row(
            record.what,
            record.peer_name or "-",
            peer,
            f"{record.ours:.3f}",
            record.unit,
            ratio,
            aim,
            reached,
        )
    return made


app = typer.Typer(add_completion=False)


@app.command()
def run(
    what: Annotated[What, typer.Argument(help="What to measure.")] = What.ALL,
    size_mib: Annotated[int, typer.Option(min=1, help="Size of each copy, MiB.")] = 512,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each side, alternating.")] = 5,
    run_pages: Annotated[
        list[int] | None,
        typer.Option(help="Equal pages between pages of one's own; 0: all equal. Repeatable."),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="Fingerprints for the index.")] = 1_000_000,
) -> None:
    """Measure side by side with the peers; JSON lines on standard output, a table beside it."""
    records = []
    sizes = Sizes(size_mib << 20, runs, tuple(run_pages or RUN_PAGES), pages)
    for record in measured(what, sizes):
        print(record.line(), flush=True)
        records.append(record)
    Console(stderr=True).print(table(records))


@app.command()
def plot(
    lines: Annotated[Path, typer.Argument(help="File of JSON lines that `run` printed.")],
    out: Annotated[Path, typer.Argument(help="Picture to write, .png or .svg.")],
) -> None:
    """Draw how far each figure is from its aim."""
    # here: the extra `plot` is needed for pictures alone
    from bench import picture

    try:
        records = [parse(line) for line in lines.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{lines} holds no figures of a run: {error}")
    picture.draw(records, out)


if __name__ == "__main__":
    app()
