"""What all subcommands share: their common options, tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DirectoryOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        help="A host's socket directory, or the directory of 'samepage up'. "
        "Default: $SAMEPAGE_DIR, else /run/samepage.",
    ),
]
DomainOption = Annotated[str | None, typer.Option(help="Only this domain.")]

# Into a file or a pipe, tables get the columns that they need.
console = Console() if sys.stdout.isatty() else Console(width=200)
messages = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print one JSON document on a line of its own."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table; columns whose name begins with ">" are aligned to the right."""
    console.print(make_table(columns, rows, title))


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """Return a table; columns whose name begins with ">" are aligned to the right."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        # a name that was cut short is of no use
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,}" for cell in row))
    return table
