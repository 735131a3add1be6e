"""The command `samepage-webhook`."""

from __future__ import annotations

from samepage.daemon.command import execute
from samepage_kubernetes.webhook.config import SECTION, Config
from samepage_kubernetes.webhook.service import WebhookService


def main() -> None:
    """Run the webhook until SIGINT or SIGTERM."""
    execute(SECTION, Config, WebhookService)


if __name__ == "__main__":
    main()
