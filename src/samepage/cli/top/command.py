"""The subcommand: once, or again and again until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.live import Live

from samepage.cli import places
from samepage.cli.output import DirectoryOption, DomainOption, JsonOption, console, print_json
from samepage.cli.top.screen import Screen
from samepage.cli.top.snapshot import Snapshot, take

_REDRAWS_A_SECOND = 4
_TERMINATED = 128 + signal.SIGTERM


def top(
    directory: DirectoryOption = None,
    domain: DomainOption = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds from one look to the next.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    json: JsonOption = False,
) -> None:
    """Show who shares and saves what, live until Ctrl-C: hosts, processes, arenas, domains.

    Where standard output is no terminal, tables are printed once; --json prints a line each
    interval, or one with --once. "+?" marks memory of processes that do not tell all of it.
    """
    hosts = places.find(directory).hosts
    first = take(hosts)
    if json:
        print_json(first.to_json(domain))
    elif once or not console.is_terminal or console.is_dumb_terminal:
        console.print(Screen(first, domain, limited=False))
        return
    if once:
        return
    try:
        if json:
            for snapshot in _snapshots(hosts, first, interval):
                print_json(snapshot.to_json(domain))
        else:
            _show(hosts, first, interval, domain)
    except KeyboardInterrupt:
        return


def _show(
    hosts: tuple[places.Host, ...], first: Snapshot, interval: float, domain: str | None
) -> None:
    live = Live(
        Screen(first, domain, limited=True),
        console=console,
        screen=True,
        refresh_per_second=_REDRAWS_A_SECOND,
    )
    with _ending_in_order():
        # No `with`: a signal while it starts must end it too.
        try:
            live.start(refresh=True)
            for snapshot in _snapshots(hosts, first, interval):
                live.update(Screen(snapshot, domain, limited=True), refresh=True)
        finally:
            live.stop()


def _snapshots(
    hosts: tuple[places.Host, ...], snapshot: Snapshot, interval: float
) -> Iterator[Snapshot]:
    """Look again whenever the interval is over."""
    while True:
        time.sleep(max(snapshot.taken + interval - time.monotonic(), 0))
        snapshot = take(hosts, snapshot)
        yield snapshot


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Have SIGTERM give the terminal back its screen."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
