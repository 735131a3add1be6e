"""A Kubernetes API server, as far as TokenReviews go: over HTTPS, with accounts of its own."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
REVIEWER = "the token of the daemons"


class FakeTokenApi:
    """Start it inside an event loop.

    Args:
        directory: for the files that the daemons want.
        host: the address to listen on.

    Attributes:
        tokens: token -> (audience, user name, extra); others are forged.
        reviews: the tokens asked about so far.
        status: an HTTP status to answer with instead; 0: none.
        answer: what to answer instead of a review; None: a review.
    """

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        self.tokens: dict[str, tuple[str, str, dict[str, list[str]]]] = {}
        self.reviews: list[str] = []
        self.status = 0
        self.answer: object = None
        self.ca_file = directory / "api-ca.crt"
        self.token_file = directory / "api-token"
        self.token_file.write_text(REVIEWER + "\n")
        self.host = host
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.renew()

    @property
    def settings(self) -> dict[str, Any]:
        """The daemons' settings for it."""
        return {
            "identity": "token",
            "token_api": f"https://{self.host}:{self.port}",
            "token_api_ca_file": self.ca_file,
            "token_api_token_file": self.token_file,
        }

    def admit(self, token: str, namespace: str, audience: str = "samepage", **extra: str) -> str:
        """Know a token of a service account; returns it."""
        long = {
            f"authentication.kubernetes.io/{key.replace('_', '-')}": [value]
            for key, value in extra.items()
        }
        self.tokens[token] = (audience, f"system:serviceaccount:{namespace}:default", long)
        return token

    def renew(self) -> None:
        """A certificate of a new authority."""
        authority = trustme.CA()
        authority.issue_cert(self.host).configure_cert(self._context)
        self.ca_file.write_bytes(authority.cert_pem.bytes())

    async def start(self) -> None:
        """Serve; at the same port as before, if it did."""
        application = web.Application()
        application.router.add_post(PATH, self._review)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, ssl_context=self._context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Be away."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _review(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {REVIEWER}":
            return web.json_response({"kind": "Status", "code": 401}, status=401)
        if self.status:
            return web.json_response({"kind": "Status", "code": self.status}, status=self.status)
        review = await request.json()
        assert (review["apiVersion"], review["kind"]) == (
            "authentication.k8s.io/v1",
            "TokenReview",
        )
        token, wanted = review["spec"]["token"], review["spec"]["audiences"]
        self.reviews.append(token)
        review["status"] = self._status(token, wanted)
        answer = review if self.answer is None else self.answer
        return web.json_response(answer, status=201)

    def _status(self, token: str, wanted: list[str]) -> dict[str, Any]:
        known = self.tokens.get(token)
        if known is None:
            return {"user": {}, "error": "invalid bearer token, or it has expired"}
        audience, name, extra = known
        if audience not in wanted:
            return {"user": {}, "error": f"token audiences {[audience]} is invalid for {wanted}"}
        user = {"username": name, "groups": ["system:serviceaccounts"], "extra": extra}
        return {"authenticated": True, "user": user, "audiences": [audience]}
