"""The webhook as a service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import grpc
import structlog
from prometheus_client.core import Metric

from samepage.daemon.metrics import counter
from samepage.daemon.server import Health
from samepage_kubernetes.webhook.admission import Admission
from samepage_kubernetes.webhook.config import Config
from samepage_kubernetes.webhook.server import WebhookServer

log = structlog.get_logger(__name__)


class WebhookService:
    """Any number of these may run. Healthy while it serves.

    Attributes:
        address: where reviews are answered, once started.
    """

    name = "webhook"
    reflection = False
    tls_files = None
    health_listen = ""

    def __init__(self, config: Config) -> None:
        self._config = config
        # Over gRPC, health is all that there is to serve.
        self.listen = (config.health_listen,)
        self.drain_seconds = config.drain_seconds
        self.ready_file: Path | None = config.ready_file
        self.metrics_listen = config.metrics_listen
        self.health = Health([])
        self.address = ""
        self._admission = Admission(config)
        self._server: WebhookServer | None = None
        self._following: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Nothing: reviews come over HTTPS."""

    async def start(self) -> None:
        """Listen for the API server.

        Raises:
            ConfigError: the certificate will not do.
            ListenError: the address cannot be served on.
        """
        config = self._config
        self._server = WebhookServer(self._admission, config.tls_cert_file, config.tls_key_file)
        self.address = await self._server.start(config.listen)
        self._following = asyncio.create_task(self._server.follow_files())
        log.info("taking reviews", address=self.address)

    async def metrics(self) -> Iterable[Metric]:
        """What came of the reviews."""
        text = "Reviews answered, by what came of them."
        outcomes = dict(self._admission.outcomes)
        return [counter("samepage_webhook_reviews", text, outcomes, "outcome")]

    async def drain(self) -> None:
        """Nothing to end: reviews are short."""

    async def close(self) -> None:
        """Stop listening."""
        if self._following is not None:
            self._following.cancel()
        if self._server is not None:
            await self._server.stop()
