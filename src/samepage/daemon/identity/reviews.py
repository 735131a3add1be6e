"""Asks the Kubernetes API server whose a token is (TokenReview, authentication.k8s.io/v1)."""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from samepage.daemon.config import ConfigError
from samepage.daemon.files import Look, look

_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_ATTEMPT_SECONDS = 2.0
_ATTEMPTS = 2
_ACCOUNT_PREFIX = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"

log = structlog.get_logger(__name__)


class UnavailableError(Exception):
    """The API server does not answer, or not us. The text says why."""


class RefusedError(Exception):
    """The API server says no. The text says why."""


@dataclass(frozen=True)
class Account:
    """Whose a token is. Pod and node are empty when the token does not say them."""

    namespace: str
    name: str
    pod_uid: str = ""
    node: str = ""


class Reviewer:
    """A client of the API server.

    Args:
        api: https://host:port; empty: as pods find it.
        ca_file, token_file: who it must be, and who we are; read anew when they change.
        audience: what tokens must be for.

    Raises:
        ConfigError: there is no API server, or no file.
    """

    def __init__(self, api: str, ca_file: Path, token_file: Path, audience: str) -> None:
        self._url = (api or _in_cluster()).rstrip("/") + _PATH
        self._ca_file = ca_file
        self._token_file = token_file
        self._audience = audience
        self._session: aiohttp.ClientSession | None = None
        self._seen: Look = ()
        self._context = _trust(ca_file)
        self._own_token()

    async def review(self, token: str) -> Account:
        """Whose the token is.

        Raises:
            RefusedError: nobody's, or it is for somebody else.
            UnavailableError: it cannot be known now.
        """
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self._audience]},
        }
        for attempt in range(_ATTEMPTS):
            try:
                return self._read(await self._ask(body))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why = str(error) or "no answer in time"
                log.warning("the API server is away", url=self._url, why=why, attempt=attempt + 1)
        raise UnavailableError("the Kubernetes API server does not answer")

    async def close(self) -> None:
        """End the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, body: dict[str, Any]) -> Any:
        try:
            headers = {"Authorization": f"Bearer {self._own_token()}"}
            self._refresh()
        except ConfigError as error:
            raise _broken(str(error)) from error
        if self._session is None:
            self._session = aiohttp.ClientSession()
        async with (
            asyncio.timeout(_ATTEMPT_SECONDS),
            self._session.post(
                self._url, json=body, headers=headers, ssl=self._context, allow_redirects=False
            ) as answer,
        ):
            if answer.status in (401, 403):
                raise _broken(
                    f"the API server does not let this daemon review tokens ({answer.status}): "
                    "its service account needs the cluster role system:auth-delegator"
                )
            if answer.status not in (200, 201):
                raise aiohttp.ClientError(f"status {answer.status}")
            return await answer.json(content_type=None)

    def _read(self, review: Any) -> Account:
        try:
            status = review["status"]
            user = status.get("user", {})
            if status.get("authenticated") is not True:
                raise RefusedError(f"the token is not valid: {status.get('error') or 'refused'}")
            # Without this list the API server took it for a token for itself.
            if self._audience not in status.get("audiences", ()):
                raise RefusedError(f"the token is not for the audience {self._audience!r}")
            name = user["username"]
            extra = user.get("extra", {})
            pod, node = ((extra.get(_EXTRA + key) or [""])[0] for key in ("pod-uid", "node-name"))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise aiohttp.ClientError("what it answers is no TokenReview") from error
        namespace, colon, account = name.removeprefix(_ACCOUNT_PREFIX).partition(":")
        if not (name.startswith(_ACCOUNT_PREFIX) and colon and namespace and account):
            raise RefusedError(f"the token is {name}'s, which is no service account")
        return Account(namespace, account, str(pod), str(node))

    def _refresh(self) -> None:
        seen = look(self._ca_file)
        if seen != self._seen:
            self._context = _trust(self._ca_file)
            self._seen = seen

    def _own_token(self) -> str:
        try:
            return self._token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read token_api_token_file: {error}") from error


def _broken(text: str) -> UnavailableError:
    log.error("cannot review tokens", why=text)
    return UnavailableError("the host's daemon cannot ask the Kubernetes API server: see its log")


def _in_cluster() -> str:
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError(
            "identity is token, but this is no pod (KUBERNETES_SERVICE_HOST is not set): set "
            "token_api to the API server's https://host:port"
        )
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _trust(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"token_api_ca_file {ca_file} will not do: {error}") from error
