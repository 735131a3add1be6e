"""The command `samepage-merger`."""

from __future__ import annotations

from samepage.daemon.command import execute
from samepage_merger.config import SECTION, Config
from samepage_merger.service import MergerService


def main() -> None:
    """Run the merger until a signal."""
    execute(SECTION, Config, MergerService, lambda config: config.node_name)


if __name__ == "__main__":
    main()
