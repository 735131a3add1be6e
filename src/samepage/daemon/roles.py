"""Which daemon may call what of which: the one table, and the guard that holds to it.

A daemon's role is a DNS name in its certificate, `merger.samepage` for example. Who is called
looks up the caller's roles here; who calls checks that the other end has the role that it wants
(samepage.daemon.tls). What is not in the table is for nobody.

Calls over a unix socket are not guarded: the socket's mode is, which leaves it to its owner.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog

NAME_SUFFIX = ".samepage"

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class Role(enum.StrEnum):
    """Who a certificate is for."""

    SCANNER = "scanner"
    MERGER = "merger"
    INDEX = "index"
    ARENAS = "arenas"
    #: A person, or a program that watches over the cluster.
    OPERATOR = "operator"
    #: An application that has its arenas held by samepage-arenas.
    CLIENT = "client"

    @property
    def dns_name(self) -> str:
        """The name in the certificate."""
        return self.value + NAME_SUFFIX


ANYONE = frozenset(Role)

#: By service, or by method where one differs from its service.
ALLOWED: dict[str, frozenset[Role]] = {
    "samepage.v1.Index": frozenset({Role.SCANNER, Role.MERGER, Role.OPERATOR}),
    "samepage.v1.Index/Publish": frozenset({Role.SCANNER}),
    "samepage.v1.Merger": frozenset({Role.OPERATOR}),
    "samepage.v1.Merger/Merge": frozenset({Role.SCANNER}),
    "samepage.v1.Merger/Evict": frozenset({Role.SCANNER, Role.OPERATOR}),
    "samepage.v1.Merger/GetMergerStatus": frozenset({Role.SCANNER, Role.OPERATOR}),
    "samepage.v1.Pages": frozenset({Role.MERGER}),
    "samepage.v1.Scanner": frozenset({Role.OPERATOR}),
    "samepage.v1.Scanner/Locate": frozenset({Role.MERGER}),
    "samepage.v1.Arenas": frozenset({Role.CLIENT, Role.OPERATOR}),
    "grpc.health.v1.Health": ANYONE,
    "grpc.reflection.v1alpha.ServerReflection": frozenset({Role.OPERATOR}),
}


def allowed(method: str) -> frozenset[Role]:
    """Who may call "/package.Service/Method"."""
    name = method.removeprefix("/")
    return ALLOWED.get(name) or ALLOWED.get(name.partition("/")[0]) or frozenset()


def refusal(method: str, names: set[str]) -> str | None:
    """Why a caller whose certificate is for these DNS names may not call a method; None: it may."""
    roles = allowed(method)
    if not names.isdisjoint(role.dns_name for role in roles):
        return None
    has = ", ".join(sorted(names)) or "no name"
    takes = " or ".join(sorted(role.dns_name for role in roles)) or "nobody"
    return f"{method} is for {takes}, and the caller's certificate is for {has}"


class RoleGuard(grpc.aio.ServerInterceptor):
    """Refuses callers whose certificate is for none of the roles that may call a method."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Put the check before the method's handler."""
        handler = await continuation(handler_call_details)
        # None for a method that is not here: gRPC says so itself.
        return None if handler is None else _guarded(handler, handler_call_details.method)


def _guarded(
    handler: grpc.RpcMethodHandler[Any, Any], method: str
) -> grpc.RpcMethodHandler[Any, Any]:
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behaviour = getattr(handler, kind)

    async def answer(request: Any, context: Context) -> Any:
        await _check(method, context)
        return await behaviour(request, context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        await _check(method, context)
        async for response in behaviour(request, context):
            yield response

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    guarded: grpc.RpcMethodHandler[Any, Any] = make(
        stream if inspect.isasyncgenfunction(behaviour) else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return guarded


async def _check(method: str, context: Context) -> None:
    peer = context.auth_context()
    if b"ssl" not in peer.get("transport_security_type", ()):
        return
    names = {name.decode(errors="replace") for name in peer.get("peer_dns", ())}
    text = refusal(method, names)
    if text is not None:
        has = ", ".join(sorted(names)) or "no name"
        log.warning("call refused", peer=context.peer(), method=method, names=has)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)
