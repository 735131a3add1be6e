"""The command `samepage-index`."""

from __future__ import annotations

from samepage.daemon.command import execute
from samepage_index.config import SECTION, IndexConfig
from samepage_index.service import IndexService


def main() -> None:
    """Run the index until SIGINT or SIGTERM."""
    execute(SECTION, IndexConfig, IndexService)


if __name__ == "__main__":
    main()
