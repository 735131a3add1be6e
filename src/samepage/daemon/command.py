"""The command line that the services have in common."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from samepage.daemon import logs
from samepage.daemon.config import load, render
from samepage.daemon.server import Service, run
from samepage.errors import InvalidArgumentError, SamepageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class ServiceConfig(DataclassInstance, Protocol):
        """What every service's config has."""

        @property
        def log_level(self) -> str: ...

    Config = TypeVar("Config", bound=ServiceConfig)
else:
    Config = TypeVar("Config")


def execute(
    section: str,
    config_class: type[Config],
    build: Callable[[Config], Service],
    node: Callable[[Config], str] = lambda _config: "",
) -> None:
    """Parse the command line, run the service, exit.

    Exit codes: 0 after a graceful stop, 1 when the service cannot run, 2 when a setting is wrong,
    130 and 143 after a second signal. `build` runs inside the event loop.
    """
    name = section.replace("_", "-")

    def serve(
        config: Annotated[
            Path | None,
            typer.Option(help="TOML file; the service reads the table of its name."),
        ] = None,
        print_config: Annotated[
            bool, typer.Option("--print-config", help="Print the settings in force and exit.")
        ] = False,
    ) -> None:
        settings = load(config_class, section, config)
        if print_config:
            sys.stdout.write(render(settings, section))
            return
        logs.configure(settings.log_level, name, node(settings))
        asyncio.run(_run(settings, build))

    serve.__doc__ = (
        f"Run samepage's {name}. Every setting can also be given in the environment, as "
        f"SAMEPAGE_{section.upper()}_<SETTING>."
    )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    try:
        app()
    except SamepageError as error:
        sys.stderr.write(f"samepage-{name}: {error}\n")
        sys.exit(2 if isinstance(error, InvalidArgumentError) else 1)


async def _run(settings: Config, build: Callable[[Config], Service]) -> None:
    await run(build(settings))
