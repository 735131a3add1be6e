"""The webhook's HTTPS server, whose certificate may change while it runs."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import structlog
from aiohttp import web

from samepage.daemon.addresses import host_and_port
from samepage.daemon.config import ConfigError
from samepage.daemon.files import look
from samepage.daemon.server import ListenError
from samepage_kubernetes.webhook.admission import Admission, BadReviewError

PATH = "/inject"

# Above what the API server's largest objects make of a review.
_BODY_BYTES_MAX = 8 << 20
_CHECK_SECONDS = 1.0

log = structlog.get_logger(__name__)


class WebhookServer:
    """Serves POST /inject.

    Args:
        admission: answers.
        cert, key: its files.

    Raises:
        ConfigError: the files will not do.
    """

    def __init__(self, admission: Admission, cert: Path, key: Path) -> None:
        self._admission = admission
        self._files = cert, key
        self._seen = look(cert, key)
        self._context = _load(cert, key)
        application = web.Application(client_max_size=_BODY_BYTES_MAX)
        application.router.add_post(PATH, self._review)
        self._runner = web.AppRunner(application, access_log=None)

    async def start(self, listen: str) -> str:
        """Serve on "host:port"; returns the address with the port that it got.

        Raises:
            ListenError: it cannot be served on.
        """
        host, port = host_and_port(listen)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner,
            host,
            int(port),
            ssl_context=self._context,
        )
        try:
            await site.start()
        except OSError as error:
            raise ListenError(f"cannot listen on {listen}: {error.strerror}") from error
        return f"{listen.rpartition(':')[0]}:{self._runner.addresses[0][1]}"

    async def follow_files(self) -> None:
        """Take new certificates for new connections, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            seen = look(*self._files)
            if seen == self._seen:
                continue
            self._seen = seen
            try:
                # Into a context of its own first, so that half a change does no harm.
                _load(*self._files)
                self._context.load_cert_chain(*self._files)
            except (ConfigError, OSError, ssl.SSLError) as error:
                log.warning("certificate not changed", why=str(error))
            else:
                log.info("certificate changed", file=str(self._files[0]))

    async def stop(self) -> None:
        """End."""
        await self._runner.cleanup()

    async def _review(self, request: web.Request) -> web.Response:
        try:
            answer = self._admission.answer(await request.read())
        except BadReviewError as error:
            log.warning("not a review", why=str(error), peer=request.remote)
            return web.Response(status=400, text=f"{error}\n")
        return web.json_response(answer)


def _load(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{cert} and {key} are not a certificate and its key, without a password, in PEM: "
            f"{error}"
        ) from error
    return context
