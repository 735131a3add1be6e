"""gRPC's side of the index: converts and delegates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, NoReturn

import grpc
from prometheus_client import Counter, Histogram

from samepage.errors import InvalidArgumentError, SamepageError, ServiceUnavailableError
from samepage.v1 import index_pb2, index_pb2_grpc
from samepage_index.errors import NameTakenError
from samepage_index.hosts import Host
from samepage_index.index import Index, Publisher

_STATUS: tuple[tuple[type[SamepageError], grpc.StatusCode], ...] = (
    (InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (NameTakenError, grpc.StatusCode.ALREADY_EXISTS),
    (ServiceUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (SamepageError, grpc.StatusCode.INTERNAL),
)

_REQUEST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

Context = grpc.aio.ServicerContext[Any, Any]


class IndexServicer(index_pb2_grpc.IndexServicer):
    """samepage.v1.Index.

    Args:
        lease_ms: what hosts are told.
    """

    def __init__(self, index: Index, lease_ms: int) -> None:
        self._index = index
        self._lease_ms = lease_ms
        self._draining = asyncio.Event()
        self.requests = Histogram(
            "samepage_index_request_seconds",
            "How long requests took, by kind, those that failed too.",
            ["kind"],
            buckets=_REQUEST_SECONDS,
            registry=None,
        )
        self.errors = Counter(
            "samepage_index_request_errors",
            "Requests that failed, by kind.",
            ["kind"],
            registry=None,
        )
        for kind in ("announce", "batch", "renew", "leave", "lookup"):
            self.requests.labels(kind)
            self.errors.labels(kind)

    def drain(self) -> None:
        """End the open streams."""
        self._draining.set()

    async def Publish(
        self, request_iterator: AsyncIterator[index_pb2.PublishRequest], context: Context
    ) -> AsyncIterator[index_pb2.PublishResponse]:
        """One scanner's stream."""
        publisher = self._index.publisher()
        requests = aiter(request_iterator)
        while (request := await self._next(requests)) is not None:
            try:
                with self._measured(request.WhichOneof("kind") or "none"):
                    response = await self._answer(publisher, request)
            except SamepageError as error:
                await _abort(context, error)
            yield response
        if self._draining.is_set():
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "this index is stopping: connect again"
            )

    async def Lookup(
        self, request: index_pb2.LookupRequest, context: Context
    ) -> index_pb2.LookupResponse:
        """Who holds what."""
        try:
            with self._measured("lookup"):
                found = await self._index.lookup(request.domain_id, request.fingerprints)
        except SamepageError as error:
            await _abort(context, error)
        return index_pb2.LookupResponse(hosts=map(_host, found.hosts), holders=found.holders)

    async def ListHosts(
        self, request: index_pb2.ListHostsRequest, context: Context
    ) -> index_pb2.ListHostsResponse:
        """The live hosts."""
        try:
            return index_pb2.ListHostsResponse(hosts=map(_host, await self._index.hosts()))
        except SamepageError as error:
            await _abort(context, error)

    async def GetIndexStats(
        self, request: index_pb2.GetIndexStatsRequest, context: Context
    ) -> index_pb2.GetIndexStatsResponse:
        """Sizes."""
        try:
            size, hosts, store = await self._index.stats()
        except SamepageError as error:
            await _abort(context, error)
        return index_pb2.GetIndexStatsResponse(
            entries=size.entries,
            fingerprints=size.fingerprints,
            stored_bytes=size.stored_bytes,
            hosts=hosts,
            store=store,
        )

    @contextlib.contextmanager
    def _measured(self, kind: str) -> Iterator[None]:
        with self.requests.labels(kind).time(), self.errors.labels(kind).count_exceptions():
            yield

    async def _next(
        self, requests: AsyncIterator[index_pb2.PublishRequest]
    ) -> index_pb2.PublishRequest | None:
        """The next request; None when the stream ended or the service drains."""
        request = asyncio.ensure_future(anext(requests, None))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({request, draining}, return_when=asyncio.FIRST_COMPLETED)
            return request.result() if request.done() else None
        finally:
            draining.cancel()
            if not request.done():
                request.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await request

    async def _answer(
        self, publisher: Publisher, request: index_pb2.PublishRequest
    ) -> index_pb2.PublishResponse:
        match request.WhichOneof("kind"):
            case "announce":
                announce = request.announce
                resumed = await publisher.announce(
                    announce.host, announce.epoch, announce.merger_address
                )
                return index_pb2.PublishResponse(
                    announced=index_pb2.Announced(resumed=resumed, lease_ms=self._lease_ms)
                )
            case "batch":
                batch = request.batch
                held = await publisher.publish(batch.domain_id, batch.added, batch.removed)
                return index_pb2.PublishResponse(accepted=index_pb2.Accepted(held_elsewhere=held))
            case "renew":
                known = await publisher.renew()
                return index_pb2.PublishResponse(renewed=index_pb2.Renewed(known=known))
            case "leave":
                await publisher.leave()
                return index_pb2.PublishResponse(left=index_pb2.Left())
            case _:
                raise InvalidArgumentError(
                    "a request holds an Announce, a Batch, a Renew or a Leave"
                )


def _host(host: Host) -> index_pb2.Host:
    return index_pb2.Host(
        name=host.name,
        epoch=host.epoch,
        merger_address=host.merger_address,
        lease_remaining_ms=host.remaining_ms,
    )


async def _abort(context: Context, error: SamepageError) -> NoReturn:
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    await context.abort(status, str(error))
