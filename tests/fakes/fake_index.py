"""An index that speaks index.proto, keeps one host's fingerprints in sets, and can fail."""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from samepage.v1 import index_pb2, index_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


def split(packed: bytes) -> set[bytes]:
    """Packed fingerprints one by one."""
    return {packed[first : first + 16] for first in range(0, len(packed), 16)}


class FakeIndex(index_pb2_grpc.IndexServicer):
    """Attributes:
    held: fingerprints by domain id.
    others: what other hosts hold, by their names.
    announced: every Announce that came.
    batches, renewals: how many came.
    fail_batches: so many batches from now on are taken but not acknowledged: the stream breaks.
    """

    def __init__(self, lease_ms: int = 200, port: int = 0) -> None:
        self.held: dict[bytes, set[bytes]] = defaultdict(set)
        self.others: dict[str, set[bytes]] = {}
        self.announced: list[index_pb2.Announce] = []
        self.batches = 0
        self.renewals = 0
        self.fail_batches = 0
        self._epoch = 0
        self._lease_ms = lease_ms
        self._changed = asyncio.Event()
        self._server = grpc.aio.server()
        index_pb2_grpc.add_IndexServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def take_over(self, other: FakeIndex) -> None:
        """Know what another one knew, as with one Redis behind both."""
        self.held, self._epoch = other.held, other._epoch

    def lose(self) -> None:
        """Forget all hosts."""
        self.held.clear()
        self._epoch = 0

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what requests bring about."""
        async with asyncio.timeout(20):
            while not condition():
                changed = self._changed
                await changed.wait()

    async def settled(self) -> None:
        """Wait until the scanner has nothing to tell: it renews only then."""
        seen = self.renewals
        await self.until(lambda: self.renewals >= seen + 2)

    async def Publish(
        self,
        request_iterator: AsyncIterator[index_pb2.PublishRequest],
        context: Context,
    ) -> AsyncIterator[index_pb2.PublishResponse]:
        async for request in request_iterator:
            answer = await self._answer(request, context)
            yield answer
            self._changed.set()
            self._changed = asyncio.Event()

    async def _answer(
        self, request: index_pb2.PublishRequest, context: Context
    ) -> index_pb2.PublishResponse:
        kind = request.WhichOneof("kind")
        if kind == "announce":
            self.announced.append(request.announce)
            resumed = self._epoch == request.announce.epoch
            self._epoch = request.announce.epoch
            if not resumed:
                self.held.clear()
            announced = index_pb2.Announced(resumed=resumed, lease_ms=self._lease_ms)
            return index_pb2.PublishResponse(announced=announced)
        if kind == "renew":
            self.renewals += 1
            renewed = index_pb2.Renewed(known=self._epoch != 0)
            return index_pb2.PublishResponse(renewed=renewed)
        self.batches += 1
        held = self.held[request.batch.domain_id]
        held |= split(request.batch.added)
        held -= split(request.batch.removed)
        if self.fail_batches:
            self.fail_batches -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Redis is away")
        return index_pb2.PublishResponse(accepted=index_pb2.Accepted())

    async def Lookup(
        self, request: index_pb2.LookupRequest, context: Context
    ) -> index_pb2.LookupResponse:
        packed = request.fingerprints
        wanted = [packed[first : first + 16] for first in range(0, len(packed), 16)]
        hosts = [*self.others, self.announced[-1].host]
        holders = [
            struct.pack("<II", number, host)
            for number, fingerprint in enumerate(wanted)
            for host, name in enumerate(hosts)
            if fingerprint in self.others.get(name, self.held[request.domain_id])
        ]
        return index_pb2.LookupResponse(
            hosts=[index_pb2.Host(name=name) for name in hosts], holders=b"".join(holders)
        )

    async def ListHosts(
        self, request: index_pb2.ListHostsRequest, context: Context
    ) -> index_pb2.ListHostsResponse:
        """UNIMPLEMENTED: a scanner does not ask."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this index")

    async def GetIndexStats(
        self, request: index_pb2.GetIndexStatsRequest, context: Context
    ) -> index_pb2.GetIndexStatsResponse:
        """UNIMPLEMENTED: a scanner does not ask."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this index")
