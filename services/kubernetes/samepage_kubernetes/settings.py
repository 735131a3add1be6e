"""The settings that the device plugin and the webhook have in common."""

from __future__ import annotations

from dataclasses import dataclass

from samepage.daemon.addresses import check_listen
from samepage.daemon.config import setting
from samepage.daemon.settings import DaemonSettings


@dataclass(frozen=True)
class KubernetesSettings(DaemonSettings):
    """A base of their configs."""

    health_listen: str = setting(
        "127.0.0.1:0",
        "Address of the health service (gRPC), host:port. Port 0 takes any free one.",
    )

    def check_kubernetes(self) -> None:
        """Check these settings.

        Raises:
            ConfigError: one makes no sense.
        """
        self.check_daemon()
        check_listen(self.health_listen)
