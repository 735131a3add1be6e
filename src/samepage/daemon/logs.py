"""Structured logs on standard error: JSON lines, or coloured text on a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from samepage.daemon.config import require

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let a module that is not loaded yet seem not to be installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# With it structlog draws tracebacks on a terminal: a fifth of a daemon's start, and 4 MiB.
with _hidden("rich"):
    import structlog

#: Lines that were logged, by level.
counts: Counter[str] = Counter()

LEVELS = ("debug", "info", "warning", "error", "critical")


def check_level(level: str) -> None:
    """Check a log level's name, for `__post_init__` of a config.

    Raises:
        ConfigError: it is not one of `LEVELS`.
    """
    require(level.lower() in LEVELS, f"log_level must be one of {', '.join(LEVELS)}, not {level!r}")


def configure(level: str, service: str, node: str) -> None:
    """Send the logs of this process, those of libraries included, to standard error.

    Args:
        level: the lowest one shown, one of `LEVELS`.
        service: such as "index"; with `node` a field of every line.
        node: the host's name; may be empty.
    """
    check_level(level)
    number = getattr(logging, level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _count,
        _add_origin(service, node),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    _configure_libraries(number, shared, render)


def _count(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    counts[event["level"]] += 1
    return event


def _add_origin(service: str, node: str) -> Processor:
    origin = {"service": service, "node": node} if node else {"service": service}

    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**origin, **event}

    return add


def _configure_libraries(level: int, shared: list[Processor], render: list[Processor]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Below warnings, libraries speak of themselves.
    root.setLevel(max(level, logging.WARNING))
