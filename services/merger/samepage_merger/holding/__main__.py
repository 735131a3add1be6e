"""The command `samepage-arenas`."""

from __future__ import annotations

from samepage.daemon.command import execute
from samepage_merger.holding.config import SECTION, Config
from samepage_merger.holding.service import ArenasService


def main() -> None:
    """Hold arenas until a signal."""
    execute(SECTION, Config, ArenasService, lambda config: config.node_name)


if __name__ == "__main__":
    main()
