"""Names of services, for pods: a DNS server that asks Kubernetes, as small as tests need it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dnslib import QTYPE, RCODE, RR, A, DNSRecord  # type: ignore[import-untyped]
from dnslib.server import BaseResolver, DNSServer  # type: ignore[import-untyped]

_DOMAIN = "svc.cluster.local"


class _Resolver(BaseResolver):  # type: ignore[misc]  # dnslib has no types
    """Answers `NAME.NAMESPACE.svc.cluster.local`: a service's address, or those of its pods."""

    def __init__(self, kubectl: Callable[..., str]) -> None:
        self._kubectl = kubectl

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        reply = request.reply()
        name = str(request.q.qname).rstrip(".")
        addresses = self._addresses(name)
        if addresses is None:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            for address in addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=1))
        return reply

    def _addresses(self, name: str) -> list[str] | None:
        parts = name.removesuffix(f".{_DOMAIN}").split(".")
        if not name.endswith(f".{_DOMAIN}") or len(parts) not in (2, 3):
            return None
        *pod, service, namespace = parts
        kinds = "services,endpoints"
        listed = self._kubectl("-n", namespace, "get", kinds, "-o", "json")
        items = [item for item in json.loads(listed)["items"] if _is(item, service)]
        if not items:
            return None
        address = next((item["spec"]["clusterIP"] for item in items if "spec" in item), "None")
        return [address] if address != "None" and not pod else _pods(items, pod)


def _is(item: dict[str, Any], service: str) -> bool:
    return bool(item["metadata"]["name"] == service)


def _pods(items: list[dict[str, Any]], pod: list[str]) -> list[str]:
    return [
        address["ip"]
        for item in items
        for subset in item.get("subsets", ())
        for address in subset.get("addresses", ())
        if not pod or address.get("hostname") == pod[0]
    ]


def serve(address: str, kubectl: Callable[..., str]) -> DNSServer:
    """Serve on port 53 of an address, in a thread, until its `stop()`."""
    server = DNSServer(_Resolver(kubectl), address=address, port=53)
    server.start_thread()
    return server
