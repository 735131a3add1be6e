"""The merger of another host, as a clone sees it: arenas are arrays, and every step can be stopped.

It follows the rules of pages.proto: what a snapshot has told of is held as it was then, an arena is
left only while it is frozen, and whatever is asked twice is answered alike.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from samepage.daemon.wire import PAGE_SIZE
from samepage.v1 import pages_pb2 as pb
from samepage.v1 import pages_pb2_grpc
from samepage_merger.cluster.away import Digests
from samepage_merger.cluster.digests import Digester
from samepage_merger.cluster.groups import GROUP_PAGES, group_digests

Pages = npt.NDArray[np.uint8]
Context = grpc.aio.ServicerContext[Any, Any]

_STRETCH = 8 * GROUP_PAGES


@dataclass
class SourceArena:
    """An arena of the source.

    Attributes:
        data: its pages.
        written: those written since the last snapshot.
        left: to which snapshot it was left.
        sealed: it can only be read.
    """

    data: Pages
    written: set[int] = field(default_factory=set)
    left: bytes = b""
    sealed: bool = False

    def write(self, page: int, data: bytes) -> None:
        """What the application does."""
        assert not self.left
        self.data[page] = np.frombuffer(data, np.uint8)
        self.written.add(page)


@dataclass
class SourceSnapshot:
    """What is held for a clone, and until when its arena is frozen.

    Attributes:
        offered: digests of the stretches that are not taken yet, by their first page; None when
            nothing is offered.
    """

    arena: SourceArena
    owner: str
    held: dict[bytes, bytes] = field(default_factory=dict)
    offered: dict[int, Digests] | None = None
    frozen_until: float = 0.0


class FakeSource(pages_pb2_grpc.PagesServicer):
    """Serves samepage.v1.Pages.

    Attributes:
        kept: pages that are held by Hold, or since a snapshot was ended so.
        offers: whether it knows how to offer, and groups.
        claims: set it, and it says that it offers what nobody asked it to offer.
        described: pages that Describe told of.
        sent: pages that were fetched.
        renewed: snapshots whose lease was renewed.
        before: called with the name of each call before it is answered; may abort it.
    """

    def __init__(self, digester: Digester) -> None:
        self.arenas: dict[str, SourceArena] = {}
        self.snapshots: dict[bytes, SourceSnapshot] = {}
        self.kept: dict[bytes, bytes] = {}
        self.offers = True
        self.claims = False
        self.described = 0
        self.sent = 0
        self.renewed: set[bytes] = set()
        self.before: Callable[[str, Context], Any] | None = None
        self.address = ""
        self._digester = digester
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Serve, on the address of last time if there was one."""
        self._server = grpc.aio.server()
        pages_pb2_grpc.add_PagesServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Serve no more; what it knows stays."""
        if self._server is not None:
            await self._server.stop(None)

    async def Snapshot(
        self, request: pb.SnapshotRequest, context: Context
    ) -> AsyncIterator[pb.SnapshotResponse]:
        """Every page, or those that were written."""
        await self._asked("Snapshot", context)
        if request.snapshot_id:
            snapshot = await self._find(request.snapshot_id, context)
            pages = sorted(snapshot.arena.written)
            snapshot_id = request.snapshot_id
        else:
            arena = self.arenas.get(request.arena)
            if arena is None or arena.left:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"no arena {request.arena!r}")
            snapshot_id = secrets.token_bytes(16)
            snapshot = self.snapshots[snapshot_id] = SourceSnapshot(arena, request.owner)
            pages = list(range(len(arena.data)))
            if request.offer and self.offers:
                assert request.group
                snapshot.offered = {}
            yield pb.SnapshotResponse(
                snapshot_id=snapshot_id, pages=len(arena.data), sealed=arena.sealed
            )
        async for response in self._told(snapshot_id, snapshot, pages, context):
            yield response

    async def Freeze(
        self, request: pb.FreezeRequest, context: Context
    ) -> AsyncIterator[pb.SnapshotResponse]:
        """The same, with nobody to write."""
        await self._asked("Freeze", context)
        snapshot = await self._find(request.snapshot_id, context)
        snapshot.frozen_until = time.monotonic() + request.milliseconds / 1000
        pages = sorted(snapshot.arena.written)
        async for response in self._told(request.snapshot_id, snapshot, pages, context):
            yield response

    async def EndSnapshot(
        self, request: pb.EndSnapshotRequest, context: Context
    ) -> pb.EndSnapshotResponse:
        """Nothing is held any more, or all of it by Hold."""
        await self._asked("EndSnapshot", context)
        snapshot = self.snapshots.pop(request.snapshot_id, None)
        if snapshot is not None and request.keep_holds:
            self.kept |= snapshot.held
        return pb.EndSnapshotResponse()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """What the pages of groups are."""
        snapshot = await self._find(request.snapshot_id, context)
        assert snapshot.offered is not None
        digests = snapshot.offered[request.first_page]
        assert len(request.groups) == -(-len(digests) // GROUP_PAGES)
        wanted = np.repeat(np.frombuffer(request.groups, np.bool_), GROUP_PAGES)[: len(digests)]
        count = int(np.count_nonzero(wanted))
        self.described += count
        return pb.DescribeResponse(
            digests=digests[wanted].tobytes(), fingerprints=bytes(16 * count)
        )

    async def Taken(self, request: pb.TakenRequest, context: Context) -> pb.TakenResponse:
        """A stretch was taken, once."""
        snapshot = await self._find(request.snapshot_id, context)
        assert snapshot.offered is not None
        del snapshot.offered[request.first_page]
        return pb.TakenResponse()

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """Whether the arena is left."""
        await self._asked("Leave", context)
        snapshot = self.snapshots.get(request.snapshot_id)
        if snapshot is not None and time.monotonic() < snapshot.frozen_until:
            snapshot.arena.left = request.snapshot_id
        left = any(arena.left == request.snapshot_id for arena in self.arenas.values())
        await self._asked("Left", context)
        return pb.LeaveResponse(left=left)

    async def Fetch(
        self, request_iterator: AsyncIterator[pb.FetchRequest], context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        """Pages that are held."""
        async for request in request_iterator:
            await self._asked("Fetch", context)
            held = dict(self.kept)
            for snapshot in self.snapshots.values():
                held |= snapshot.held
            digests = [request.digests[at : at + 32] for at in range(0, len(request.digests), 32)]
            found = [held.get(digest) for digest in digests]
            pages = [page for page in found if page is not None]
            self.sent += len(pages)
            yield pb.FetchResponse(
                found=bytes(page is not None for page in found), pages=b"".join(pages)
            )

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectResponse:
        """It takes no data connections, as an older one."""
        return pb.ConnectResponse()

    async def Hold(self, request: pb.HoldRequest, context: Context) -> pb.HoldResponse:
        """Nothing more than is held."""
        count = len(request.digests) // 32
        held = [request.digests[at * 32 : at * 32 + 32] in self.kept for at in range(count)]
        return pb.HoldResponse(held=bytes(held))

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Leases never end here; who renews which snapshot is noted."""
        self.renewed |= set(request.snapshot_ids)
        return pb.RenewResponse(holds=len(self.kept))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        """Some are not held any more."""
        for at in range(0, len(request.digests), 32):
            self.kept.pop(request.digests[at : at + 32], None)
        return pb.ReleaseResponse()

    async def LetGo(self, request: pb.LetGoRequest, context: Context) -> pb.LetGoResponse:
        """It owns nothing elsewhere."""
        return pb.LetGoResponse(agreed=bytes(len(request.digests) // 32))

    async def _told(
        self, snapshot_id: bytes, snapshot: SourceSnapshot, pages: list[int], context: Context
    ) -> AsyncIterator[pb.SnapshotResponse]:
        arena = snapshot.arena
        numbers = np.array(pages, np.int64)
        starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        for run in np.split(numbers, starts[1:]) if numbers.size else []:
            for low in range(0, run.size, _STRETCH):
                await self._asked("stretch", context)
                some = run[low : low + _STRETCH]
                arena.written -= set(some.tolist())
                data = arena.data[some].tobytes()
                digests = self._digester.pages(data)
                self._hold(snapshot, digests, data)
                response = pb.SnapshotResponse(
                    snapshot_id=snapshot_id,
                    pages=len(arena.data),
                    first_page=int(some[0]),
                    sealed=arena.sealed,
                )
                if snapshot.offered is not None:
                    snapshot.offered[int(some[0])] = digests
                    response.offered = True
                    response.groups = group_digests(self._digester, digests).tobytes()
                    response.group_pages = some.size
                else:
                    response.offered = self.claims
                    response.digests = digests.tobytes()
                    response.fingerprints = bytes(16 * some.size)
                yield response

    def _hold(self, snapshot: SourceSnapshot, digests: Digests, data: bytes) -> None:
        for number, digest in enumerate(digests):
            page = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            snapshot.held[digest.tobytes()] = page

    async def _find(self, snapshot_id: bytes, context: Context) -> SourceSnapshot:
        snapshot = self.snapshots.get(snapshot_id)
        if snapshot is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such snapshot")
        return snapshot

    async def _asked(self, call: str, context: Context) -> None:
        if self.before is not None:
            await asyncio.sleep(0)
            outcome = self.before(call, context)
            if outcome is not None:
                await outcome
