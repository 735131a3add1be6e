"""The command `samepage-scanner`."""

from __future__ import annotations

from samepage.daemon.command import execute
from samepage_scanner.config import SECTION, Config
from samepage_scanner.service import ScannerService


def main() -> None:
    """Run the scanner until SIGINT or SIGTERM."""
    execute(SECTION, Config, ScannerService, lambda config: config.node_name)


if __name__ == "__main__":
    main()
