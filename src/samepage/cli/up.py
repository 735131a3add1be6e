"""`samepage up`: a whole cluster on this machine, in the foreground."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from samepage.cli.cluster import LocalCluster
from samepage.cli.output import JsonOption, messages, print_json
from samepage.client import DEFAULT_DIRECTORY


def up(
    hosts: Annotated[int, typer.Option(help="How many hosts to run.")] = 1,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where. Default: $SAMEPAGE_DIR, else /run/samepage."),
    ] = None,
    netns: Annotated[
        bool, typer.Option("--netns", help="Give each host a network namespace of its own.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a cluster on this machine until SIGINT or SIGTERM; prints "ready" when it serves.

    Each host has its socket directory DIR/host-N. DIR/cluster.json says where everything is,
    DIR/logs what the daemons say. A daemon that dies is started again.
    """
    place = directory or Path(os.environ.get("SAMEPAGE_DIR") or DEFAULT_DIRECTORY)
    say = _printer(json)
    asyncio.run(_run(LocalCluster(place, hosts, say, netns), place, say, json))


def _printer(json: bool) -> Callable[[str], None]:
    if json:
        return lambda text: print_json({"event": "message", "text": text})
    return lambda text: messages.print(text, highlight=False, markup=False, soft_wrap=True)


async def _run(cluster: LocalCluster, place: Path, say: Callable[[str], None], json: bool) -> None:
    task = asyncio.create_task(_serve(cluster, place, say, json))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, task, loop)
    try:
        await task
    except asyncio.CancelledError:
        say("stopped")


def _stop(task: asyncio.Task[None], loop: asyncio.AbstractEventLoop) -> None:
    """The first signal ends the cluster in order; further ones change nothing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: None)
    task.cancel()


async def _serve(
    cluster: LocalCluster, place: Path, say: Callable[[str], None], json: bool
) -> None:
    say(f"starting {cluster.size} host{'' if cluster.size == 1 else 's'} in {place}")
    async with cluster as running:
        _announce(running.cluster.to_json(), say, json)
        await asyncio.Event().wait()


def _announce(cluster: dict[str, Any], say: Callable[[str], None], json: bool) -> None:
    if json:
        print_json({"event": "ready", **cluster})
        return
    for host in cluster["hosts"]:
        say(f"{host['name']}: SAMEPAGE_DIR={host['dir']}")
    typer.echo("ready")
