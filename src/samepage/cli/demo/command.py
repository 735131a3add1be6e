"""`samepage demo`: from the command line to the exit code."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from samepage.cli.demo.cluster import DemoCluster
from samepage.cli.demo.files import Input, arena_bytes, choose
from samepage.cli.demo.measure import available_bytes
from samepage.cli.demo.report import Report, show
from samepage.cli.demo.run import HOSTS, WORKERS, Demo
from samepage.cli.demo.workers import OWN_BYTES
from samepage.cli.output import JsonOption, messages, print_json
from samepage.errors import OutOfMemoryError, SamepageError
from samepage.sizes import format_size, parse_size

_MEMORY_MARGIN = 1.2


class DemoFailedError(SamepageError):
    """Some memory did not hold what it must; the report says which."""


def demo(
    files: Annotated[
        list[Path] | None,
        typer.Option(help="Load these files or directories instead; may be given repeatedly."),
    ] = None,
    size: Annotated[str, typer.Option(help="How much to load when no files are given.")] = "256MiB",
    json: JsonOption = False,
) -> None:
    """Share the memory of six real workers on two hosts, and check every byte.

    Runs two hosts on this machine, each with its own merger and scanner, an index with an
    embedded Valkey, and three workers a host that load the same files. Cleans up after itself.
    """
    report = asyncio.run(_interruptible(files or [], parse_size(size)))
    if json:
        print_json(report.to_json())
    else:
        show(report)
    if not report.ok:
        raise DemoFailedError("the demo failed: memory differs from what it must be")


async def _interruptible(own: list[Path], size: int) -> Report:
    """Run the demo; the first SIGINT or SIGTERM ends it in order."""
    task = asyncio.create_task(_demo(own, size))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _demo(own: list[Path], size: int) -> Report:
    inputs = choose(own, size)
    total = arena_bytes(inputs)
    _check_memory(total)
    _say(
        f"{len(inputs)} files, {format_size(total)}, for each of {HOSTS * WORKERS} workers on "
        f"{HOSTS} hosts, and {format_size(OWN_BYTES)} of its own for each"
    )
    _show_files(inputs)
    with tempfile.TemporaryDirectory(prefix="samepage-demo-") as directory:
        _say("starting the hosts")
        async with DemoCluster(Path(directory), HOSTS, _say) as cluster:
            with _progress() as progress:
                return await Demo(cluster, inputs, progress).run()


def _check_memory(total: int) -> None:
    need = int((total + OWN_BYTES) * HOSTS * WORKERS * _MEMORY_MARGIN)
    available = available_bytes()
    if need > available:
        raise OutOfMemoryError(
            f"the demo needs {format_size(need)} of memory before it shares, and "
            f"{format_size(available)} are available: load less (--size or --files)"
        )


def _show_files(inputs: list[Input]) -> None:
    largest = sorted(inputs, key=lambda file: file.size, reverse=True)[:3]
    for file in largest:
        _say(f"  {format_size(file.size):>10}  {file.path}")
    if len(inputs) > len(largest):
        _say(f"              and {len(inputs) - len(largest)} more")


def _say(text: str) -> None:
    messages.print(text, highlight=False, markup=False, soft_wrap=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=messages,
    )
