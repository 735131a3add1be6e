"""The settings that every daemon has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samepage.daemon.config import require, setting
from samepage.daemon.logs import check_level
from samepage.daemon.metrics import check_metrics_listen


@dataclass(frozen=True)
class DaemonSettings:
    """A base of each daemon's config."""

    metrics_listen: str = setting(
        "",
        "Address of Prometheus metrics over HTTP, host:port, at /metrics. Port 0 takes any free "
        "one. Empty: none.",
    )
    log_level: str = setting("info", "Lowest level logged: debug, info, warning or error.")
    drain_seconds: float = setting(
        5.0, "How long calls in flight may go on when stopping, in seconds."
    )
    ready_file: Path | None = setting(
        None, "File that gets the service's addresses as JSON once it serves. Empty: none."
    )

    def check_daemon(self) -> None:
        """Check these settings.

        Raises:
            ConfigError: one makes no sense.
        """
        check_metrics_listen(self.metrics_listen)
        check_level(self.log_level)
        require(self.drain_seconds >= 0, "drain_seconds must be 0 or more")
