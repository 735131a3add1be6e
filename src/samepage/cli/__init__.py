"""The `samepage` command. One module a subcommand; errors become an exit code only here.

Exit codes: 0 done, 1 failed, 2 wrong usage or argument, 3 no daemon there, 4 the kernel lacks a
feature, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from samepage import errors
from samepage.cli import (
    arenas,
    clone,
    doctor,
    evict,
    forget_host,
    migrate,
    overlap,
    policy,
    scan,
    share,
    status,
    up,
)
from samepage.cli.demo import command as demo_command
from samepage.cli.top import command as top_command
from samepage_command import INTERRUPTED

EXIT_CODES = (
    (errors.InvalidArgumentError, 2),
    (errors.NotRunningError, 3),
    (errors.UnsupportedKernelError, 4),
)

app = typer.Typer(
    name="samepage",
    help="Identical memory, stored once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    up.up,
    status.status,
    top_command.top,
    arenas.arenas,
    share.share,
    evict.evict,
    scan.scan,
    overlap.overlap,
    clone.clone,
    migrate.migrate,
    forget_host.forget_host,
    policy.policy,
    doctor.doctor,
    demo_command.demo,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"samepage {version('samepage')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None:
    """Identical memory, stored once: see what is shared, share it, try it."""


def main() -> None:
    """Run the command and exit."""
    try:
        app()
    except errors.SamepageError as error:
        sys.stderr.write(f"samepage: {error}\n")
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
