"""The command `samepage-device-plugin`."""

from __future__ import annotations

from samepage.daemon.command import execute
from samepage_kubernetes.device_plugin.config import SECTION, Config
from samepage_kubernetes.device_plugin.service import DevicePluginService


def main() -> None:
    """Run the device plugin until SIGINT or SIGTERM."""
    execute(SECTION, Config, DevicePluginService)


if __name__ == "__main__":
    main()
