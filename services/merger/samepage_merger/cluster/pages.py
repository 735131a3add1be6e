"""Serves pages to the mergers of other hosts: converts, and delegates."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, NoReturn

import grpc
import numpy as np

from samepage.daemon.failpoints import failpoint
from samepage.v1 import pages_pb2, pages_pb2_grpc
from samepage_merger.cluster import fetched
from samepage_merger.cluster.answering import Answers
from samepage_merger.cluster.digests import are_zero
from samepage_merger.cluster.groups import GROUP_PAGES, group_digests
from samepage_merger.cluster.holds import owner_of
from samepage_merger.cluster.hosts import HostAwayError
from samepage_merger.cluster.keeping import Keeper
from samepage_merger.cluster.keys import keys_of
from samepage_merger.cluster.local import Local
from samepage_merger.cluster.place import place_told
from samepage_merger.cluster.process import identify
from samepage_merger.cluster.requests import BadRequestError, check_domain, checked
from samepage_merger.cluster.snapshot_errors import (
    EndedError,
    NoAnswerError,
    NoArenaError,
    NotPossibleError,
    TooLateError,
)
from samepage_merger.cluster.snapshots import FREEZE_MS_MAX, Snapshot, Snapshots, Stretch
from samepage_merger.domains import Domains
from samepage_merger.pagemap import PRIVATE
from samepage_merger.store import STORE_ID_BYTES, StoreFullError

HOLD_MAX = 4096

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")

Context = grpc.aio.ServicerContext[Any, Any]


_FULL = "the store has no room for it: free some memory, or raise store_limit_bytes"
_STATUS: dict[type[Exception], grpc.StatusCode] = {
    BadRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NoArenaError: grpc.StatusCode.NOT_FOUND,
    EndedError: grpc.StatusCode.NOT_FOUND,
    NoAnswerError: grpc.StatusCode.UNAVAILABLE,
    NotPossibleError: grpc.StatusCode.FAILED_PRECONDITION,
    TooLateError: grpc.StatusCode.DEADLINE_EXCEEDED,
    StoreFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_ERRORS = tuple(_STATUS)


class PagesServicer(pages_pb2_grpc.PagesServicer):
    """Serves samepage.v1.Pages.

    Attributes:
        data_port: where data connections are taken; 0: nowhere.
        keeper: looks after what other hosts hold for this one; None where nobody does.
    """

    def __init__(
        self, domains: Domains, local: Local, snapshots: Snapshots, answers: Answers
    ) -> None:
        self._domains = domains
        self._local = local
        self._snapshots = snapshots
        self._answers = answers
        self._streams: set[asyncio.Task[Any]] = set()
        self.data_port = 0
        self.keeper: Keeper | None = None

    def drain(self) -> None:
        """End the streams that other hosts keep open."""
        for stream in self._streams:
            stream.cancel()

    def register(self, server: grpc.aio.Server) -> None:
        """Add this to a server, Fetch with messages of its own making."""
        fetch: grpc.RpcMethodHandler[pages_pb2.FetchRequest, bytes]
        fetch = grpc.stream_stream_rpc_method_handler(
            self.Fetch, request_deserializer=pages_pb2.FetchRequest.FromString
        )
        pages_pb2_grpc.add_PagesServicer_to_server(self, server)
        service, method = fetched.METHOD[1:].split("/")
        server.add_registered_method_handlers(service, {method: fetch})

    async def Fetch(  # type: ignore[override]  # registered apart
        self, request_iterator: AsyncIterator[pages_pb2.FetchRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Pages, one response (see fetched.py) a request."""
        stream = asyncio.current_task()
        assert stream is not None
        self._streams.add(stream)
        try:
            async for request in request_iterator:
                async with self._answers.answer(request) as parts:
                    message = b"".join(parts)
                yield message
        except BadRequestError as error:
            await _abort(context, str(error))
        finally:
            self._streams.discard(stream)

    async def Connect(
        self, request: pages_pb2.ConnectRequest, context: Context
    ) -> pages_pb2.ConnectResponse:
        """Tell where data connections are taken."""
        return pages_pb2.ConnectResponse(port=self.data_port)

    async def Hold(
        self, request: pages_pb2.HoldRequest, context: Context
    ) -> pages_pb2.HoldResponse:
        """Keep pages for another host."""
        try:
            digests, fingerprints = checked(
                request.domain_id, request.digests, request.fingerprints, HOLD_MAX
            )
            owner, seconds = _owner(request.owner, request.store_id), _lease(request.lease_ms)
        except BadRequestError as error:
            await _abort(context, str(error))
        domain = self._domains.find(request.domain_id)
        held = are_zero(digests)
        if domain is not None:
            async with self._local.slots(domain, digests, fingerprints) as slots:
                mine = slots != PRIVATE
                try:
                    lease = domain.holds.extend(owner, seconds)
                    domain.holds.grant(lease, keys_of(digests[mine]), slots[mine])
                    held |= mine
                    failpoint("pages.held")
                except StoreFullError:
                    domain.store.room(1)
        return pages_pb2.HoldResponse(held=held.tobytes())

    async def Renew(
        self, request: pages_pb2.RenewRequest, context: Context
    ) -> pages_pb2.RenewResponse:
        """Hold everything for longer."""
        try:
            owner, seconds = _owner(request.owner, request.store_id), _lease(request.lease_ms)
        except BadRequestError as error:
            await _abort(context, str(error))
        holds = 0
        for domain in self._domains:
            lease = domain.holds.lease(owner)
            try:
                if lease is not None:
                    domain.holds.extend(owner, seconds)
                    holds += len(lease.slots)
                for number in request.snapshot_ids:
                    if (snapshot := domain.holds.lease(owner, number)) is not None:
                        domain.holds.extend(owner, seconds, snapshot.snapshot)
            except StoreFullError:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _FULL)
        return pages_pb2.RenewResponse(holds=holds)

    async def Release(
        self, request: pages_pb2.ReleaseRequest, context: Context
    ) -> pages_pb2.ReleaseResponse:
        """Keep pages no longer."""
        try:
            digests, _ = checked(request.domain_id, request.digests, b"", HOLD_MAX)
            owner = _owner(request.owner, request.store_id)
        except BadRequestError as error:
            await _abort(context, str(error))
        domain = self._domains.find(request.domain_id)
        lease = domain.holds.lease(owner) if domain is not None else None
        if domain is not None and lease is not None:
            number, slots = domain.catalog.candidates(keys_of(digests))
            mine = lease.slots.contains(slots)
            number, slots = number[mine], slots[mine]
            good = await domain.catalog.verify(digests[number], slots)
            domain.holds.release(lease, slots[good])
            failpoint("pages.released")
        return pages_pb2.ReleaseResponse()

    async def LetGo(
        self, request: pages_pb2.LetGoRequest, context: Context
    ) -> pages_pb2.LetGoResponse:
        """Say what a holder may let go of, as soon as it may."""
        try:
            digests, _ = checked(request.domain_id, request.digests, b"", HOLD_MAX)
            holder = _owner(request.holder)
        except BadRequestError as error:
            await _abort(context, str(error))
        meant = request.store_id in (b"", self._domains.store_id)
        if self.keeper is None or not meant:
            return pages_pb2.LetGoResponse(agreed=bytes(len(digests)))
        try:
            agreed = await self.keeper.let_go(request.domain_id, holder, digests)
        except HostAwayError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return pages_pb2.LetGoResponse(agreed=agreed.tobytes())

    async def Snapshot(
        self, request: pages_pb2.SnapshotRequest, context: Context
    ) -> AsyncIterator[pages_pb2.SnapshotResponse]:
        """Freeze the bytes of an arena, page by page, and tell of them."""
        try:
            owner, seconds = _owner(request.owner, request.store_id), _lease(request.lease_ms)
            if request.snapshot_id:
                snapshot = self._snapshots.find(request.snapshot_id, seconds)
            else:
                check_domain(request.domain_id)
                snapshot = self._snapshots.begin(
                    request.domain_id, request.arena, owner, seconds, offer=request.offer
                )
                snapshot.grouped = request.offer and request.group
            store_id = self._domains.store_id
            async with contextlib.aclosing(self._snapshots.tell(snapshot)) as stretches:
                async for response in _responses(snapshot, stretches, store_id):
                    yield response
        except _ERRORS as error:
            await _abort_for(context, error)

    async def Freeze(
        self, request: pages_pb2.FreezeRequest, context: Context
    ) -> AsyncIterator[pages_pb2.SnapshotResponse]:
        """Stop an arena's writers, and tell what they wrote."""
        try:
            if not 1 <= request.milliseconds <= FREEZE_MS_MAX:
                raise BadRequestError(f"milliseconds must be 1 to {FREEZE_MS_MAX}")
            snapshot = self._snapshots.find(request.snapshot_id)
            frozen = self._snapshots.freeze(snapshot, request.milliseconds)
            store_id = self._domains.store_id
            async with contextlib.aclosing(frozen) as stretches:
                async for response in _responses(snapshot, stretches, store_id):
                    yield response
        except _ERRORS as error:
            await _abort_for(context, error)

    async def Leave(
        self, request: pages_pb2.LeaveRequest, context: Context
    ) -> pages_pb2.LeaveResponse:
        """Let go of a frozen arena for good."""
        try:
            left = await self._snapshots.leave(request.snapshot_id, place_told(request))
        except _ERRORS as error:
            await _abort_for(context, error)
        return pages_pb2.LeaveResponse(left=left)

    async def Describe(
        self, request: pages_pb2.DescribeRequest, context: Context
    ) -> pages_pb2.DescribeResponse:
        """Tell of the pages of groups."""
        try:
            snapshot = self._snapshots.find(request.snapshot_id)
            offers = snapshot.offers
            known = offers.describe(request.first_page) if offers is not None else None
            if known is None:
                raise NoArenaError("there is no such stretch any more")
            digests, fingerprints = known
            if len(request.groups) != -(-len(digests) // GROUP_PAGES):
                raise BadRequestError("groups must be a byte for each group of the stretch")
        except _ERRORS as error:
            await _abort_for(context, error)
        wanted = np.repeat(np.frombuffer(request.groups, np.uint8) != 0, GROUP_PAGES)
        wanted = wanted[: len(digests)]
        return pages_pb2.DescribeResponse(
            digests=digests[wanted].tobytes(), fingerprints=fingerprints[wanted].tobytes()
        )

    async def Taken(
        self, request: pages_pb2.TakenRequest, context: Context
    ) -> pages_pb2.TakenResponse:
        """Offer a stretch no longer."""
        try:
            self._snapshots.find(request.snapshot_id).taken(request.first_page)
        except _ERRORS as error:
            await _abort_for(context, error)
        return pages_pb2.TakenResponse()

    async def EndSnapshot(
        self, request: pages_pb2.EndSnapshotRequest, context: Context
    ) -> pages_pb2.EndSnapshotResponse:
        """Hold nothing of a snapshot any more, or what it holds for its owner."""
        try:
            await self._snapshots.end(request.snapshot_id, request.keep_holds)
        except _ERRORS as error:
            await _abort_for(context, error)
        return pages_pb2.EndSnapshotResponse()


async def _responses(
    snapshot: Snapshot, stretches: AsyncIterator[Stretch], store_id: bytes
) -> AsyncIterator[pages_pb2.SnapshotResponse]:
    arena = snapshot.arena
    process = identify(arena.session.peer.pid if arena.session is not None else 0)
    yield pages_pb2.SnapshotResponse(
        snapshot_id=snapshot.id,
        pages=arena.pages,
        sealed=arena.sealed,
        store_id=store_id,
        agent=arena.agent,
        arena=arena.number,
        process=pages_pb2.Process(**asdict(process)),
    )
    async for stretch in stretches:
        response = pages_pb2.SnapshotResponse(
            snapshot_id=snapshot.id,
            pages=arena.pages,
            sealed=arena.sealed,
            first_page=stretch.first_page,
            offered=snapshot.offers is not None,
        )
        if snapshot.grouped:
            response.groups = group_digests(arena.domain.digester, stretch.digests).tobytes()
            response.group_pages = len(stretch.digests)
        else:
            response.digests = stretch.digests.tobytes()
            response.fingerprints = stretch.fingerprints.tobytes()
        yield response


def _owner(name: str, store_id: bytes = b"") -> str:
    """Return by what the owner's leases are known: host_of() has its host."""
    if not _HOST.fullmatch(name):
        raise BadRequestError(f"owner must be 1 to 253 of A-Z a-z 0-9 . _ -, not {name[:80]!r}")
    if len(store_id) not in (0, STORE_ID_BYTES):
        raise BadRequestError(f"store_id has {len(store_id)} bytes, not {STORE_ID_BYTES}")
    return owner_of(name, store_id)


def _lease(lease_ms: int) -> float:
    if not lease_ms:
        raise BadRequestError("lease_ms must be 1 or more")
    return lease_ms / 1000


async def _abort(context: Context, text: str) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    raise AssertionError("abort() raises")


async def _abort_for(context: Context, error: Exception) -> NoReturn:
    await context.abort(_STATUS[type(error)], str(error) or _FULL)
    raise AssertionError("abort() raises")
