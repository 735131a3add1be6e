"""The source's side of a clone, seen from the destination: its snapshot, stretch by stretch.

Nothing that comes from there is trusted but the digests, which are the very thing asked for:
lengths and page numbers are checked, and bytes later on by digest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import numpy as np

from samepage.v1 import pages_pb2, pages_pb2_grpc
from samepage_merger.cluster.away import Digests, Mask, no_digests
from samepage_merger.cluster.digests import Fingerprints
from samepage_merger.cluster.groups import GROUP_PAGES
from samepage_merger.cluster.landing import CHUNK_PAGES, Chunk
from samepage_merger.cluster.place import NOWHERE, Place, place_told
from samepage_merger.domains import RefusedError
from samepage_merger.runs import Int64s

#: How long the source may say nothing, in seconds.
IDLE_SECONDS = 30.0
_END_SECONDS = 5.0
GATHERED_PAGES = 4096

_ERRNO = {
    grpc.StatusCode.NOT_FOUND: errno.ENOENT,
    grpc.StatusCode.INVALID_ARGUMENT: errno.EINVAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errno.ENOSPC,
    grpc.StatusCode.FAILED_PRECONDITION: errno.EBUSY,
    grpc.StatusCode.DEADLINE_EXCEEDED: errno.ETIMEDOUT,
    grpc.StatusCode.UNIMPLEMENTED: errno.EPROTONOSUPPORT,
}


@dataclass(frozen=True)
class Stretch:
    """Consecutive pages of the source, from `first` on.

    Attributes:
        offered: the source keeps them until it is told that they were taken.
        groups: digests of groups of pages; those of the pages, and their fingerprints, are only
            known when they were described.
    """

    first: int
    digests: Digests
    fingerprints: Fingerprints
    offered: bool = False
    groups: Digests = field(default_factory=no_digests)

    @property
    def pages(self) -> Int64s:
        """Their numbers."""
        return np.arange(self.first, self.first + len(self.digests))


class Snapshot:
    """One snapshot at a source.

    Args:
        host: the source, as errors call it.
        owner: this host.
        store_id: its own.
        lease_seconds: how long the source keeps it if it hears nothing more.

    Attributes:
        id: empty until the first answer.
        pages: of the arena.
        sealed: whether the arena can only be read, by the last answer.
        place: of the arena.
    """

    def __init__(
        self,
        stub: pages_pb2_grpc.PagesAsyncStub,
        host: str,
        domain_id: bytes,
        arena: str,
        owner: str,
        lease_seconds: float,
        store_id: bytes = b"",
    ) -> None:
        self.host = host
        self.id = b""
        self.pages = 0
        self.sealed = False
        self.place = NOWHERE
        self._stub = stub
        self._names = {"domain_id": domain_id, "arena": arena}
        self._owner = owner
        self._store_id = store_id
        self._lease_ms = min(round(lease_seconds * 1000), 2**32 - 1)

    @classmethod
    def known(
        cls, stub: pages_pb2_grpc.PagesAsyncStub, host: str, snapshot_id: bytes, place: Place
    ) -> Snapshot:
        """Return one that was made before, only to be ended or left."""
        snapshot = cls(stub, host, b"", "", "", 0)
        snapshot.id, snapshot.place = snapshot_id, place
        return snapshot

    def round(self, *, offer: bool = False) -> AsyncGenerator[Stretch]:
        """All pages the first time, and then those that were written since the last.

        The first time the first stretch is empty: `id` and `pages` are known by then.

        Args:
            offer: this is the only round, and whatever it tells of is fetched at once. The source
                may not know that.

        Raises:
            RefusedError: as the protocol knows it.
        """
        names = {"snapshot_id": self.id} if self.id else self._names
        request = pages_pb2.SnapshotRequest(
            owner=self._owner,
            store_id=self._store_id,
            lease_ms=self._lease_ms,
            offer=offer,
            group=offer,
            **names,
        )
        return self._stretches(self._stub.Snapshot(request), None)

    def freeze(self, milliseconds: int) -> AsyncGenerator[Stretch]:
        """Stop the writers, for at most so long; what they have written since the last round. A
        page that was written while they were being stopped may be told of again.

        Raises:
            RefusedError: as the protocol knows it.
        """
        request = pages_pb2.FreezeRequest(snapshot_id=self.id, milliseconds=milliseconds)
        return self._stretches(self._stub.Freeze(request), milliseconds / 1000)

    async def describe(self, stretch: Stretch, groups: Mask) -> Chunk:
        """Return what the pages of some groups of a stretch are.

        Raises:
            RefusedError: as the protocol knows it.
        """
        pages = stretch.pages[np.repeat(groups, GROUP_PAGES)[: len(stretch.digests)]]
        if not pages.size:
            return Chunk(pages, no_digests(), np.zeros((0, 16), np.uint8))
        request = pages_pb2.DescribeRequest(
            snapshot_id=self.id, first_page=stretch.first, groups=groups.tobytes()
        )
        with told(self.host):
            answer = await self._stub.Describe(request, timeout=IDLE_SECONDS)
        if (len(answer.digests), len(answer.fingerprints)) != (32 * pages.size, 16 * pages.size):
            raise _nonsense(self.host)
        return Chunk(
            pages,
            np.frombuffer(answer.digests, np.uint8).reshape(-1, 32),
            np.frombuffer(answer.fingerprints, np.uint8).reshape(-1, 16),
        )

    async def taken(self, first_page: int) -> None:
        """Tell that an offered stretch is here.

        Raises:
            RefusedError: as the protocol knows it.
        """
        request = pages_pb2.TakenRequest(snapshot_id=self.id, first_page=first_page)
        with told(self.host):
            await self._stub.Taken(request, timeout=IDLE_SECONDS)

    async def end(self, *, keep_holds: bool = False) -> None:
        """Let the source forget the snapshot, or hold its pages for this host until released.

        Raises:
            RefusedError: as the protocol knows it.
        """
        if not self.id:
            return
        request = pages_pb2.EndSnapshotRequest(snapshot_id=self.id, keep_holds=keep_holds)
        with told(self.host):
            await self._stub.EndSnapshot(request, timeout=_END_SECONDS)

    async def renew(self) -> None:
        """Have the source keep the snapshot for as long as it was to keep it at first.

        Raises:
            RefusedError: as the protocol knows it.
        """
        request = pages_pb2.RenewRequest(
            owner=self._owner,
            store_id=self._store_id,
            lease_ms=self._lease_ms,
            snapshot_ids=[self.id],
        )
        with told(self.host):
            await self._stub.Renew(request, timeout=_END_SECONDS)

    async def leave(self, seconds: float) -> bool:
        """Ask the source to let go of the frozen arena; whether it did, for good.

        Raises:
            RefusedError: it is not known yet; with ENOENT: the source's host will never know.
        """
        request = pages_pb2.LeaveRequest(
            snapshot_id=self.id,
            store_id=self.place.store_id,
            agent=self.place.agent,
            arena=self.place.arena,
            process=pages_pb2.Process(**asdict(self.place.process)),
        )
        with told(self.host):
            return (await self._stub.Leave(request, timeout=seconds)).left

    async def _stretches(
        self,
        responses: grpc.aio.UnaryStreamCall[Any, pages_pb2.SnapshotResponse],
        seconds: float | None,
    ) -> AsyncGenerator[Stretch]:
        """Check and pass on what the source tells."""
        everything = not self.id
        told_of = 0
        try:
            with told(self.host):
                stream = aiter(responses)
                while (response := await _next(stream, seconds or IDLE_SECONDS)) is not None:
                    stretch = self._checked(response)
                    if everything and stretch.first != told_of and len(stretch.digests):
                        raise _nonsense(self.host)
                    told_of += len(stretch.digests)
                    yield stretch
            if not self.id or (everything and told_of < self.pages):
                raise _nonsense(self.host)
        finally:
            responses.cancel()

    def _checked(self, response: pages_pb2.SnapshotResponse) -> Stretch:
        if not self.id:
            self.id, self.pages = response.snapshot_id, response.pages
            self.place = place_told(response)
        self.sealed = response.sealed
        digests = np.frombuffer(response.digests, np.uint8)
        fingerprints = np.frombuffer(response.fingerprints, np.uint8)
        if digests.size % 32 or fingerprints.size * 2 != digests.size:
            raise _nonsense(self.host)
        if response.groups:
            digests, fingerprints = self._of_groups(response)
        groups = np.frombuffer(response.groups, np.uint8).reshape(-1, 32)
        stretch = Stretch(
            response.first_page,
            digests.reshape(-1, 32),
            fingerprints.reshape(-1, 16),
            response.offered,
            groups,
        )
        end = stretch.first + len(stretch.digests)
        known = (response.snapshot_id, response.pages) == (self.id, self.pages)
        if not (known and end <= self.pages and len(self.id) == 16 and self.pages):
            raise _nonsense(self.host)
        return stretch

    def _of_groups(self, response: pages_pb2.SnapshotResponse) -> tuple[Digests, Fingerprints]:
        """Return as many digests and fingerprints as there are pages in a response's groups."""
        pages = response.group_pages
        if len(response.groups) != 32 * -(-pages // GROUP_PAGES) or not 1 <= pages <= CHUNK_PAGES:
            raise _nonsense(self.host)
        return no_digests(pages), np.zeros((pages, 16), np.uint8)


async def gathered(
    stretches: AsyncIterator[Stretch], pages: int = GATHERED_PAGES
) -> AsyncGenerator[Stretch]:
    """Pass on stretches that follow each other as fewer ones, of so many pages or a bit more: what
    is done for each costs much the same, however long it is. Those that are offered stay as they
    are."""
    parts: list[Stretch] = []
    count = 0
    async for stretch in stretches:
        if stretch.offered:
            yield stretch
            continue
        parts.append(stretch)
        count += len(stretch.digests)
        if count >= pages:
            yield _joined(parts)
            parts, count = [], 0
    if count:
        yield _joined(parts)


def _joined(parts: list[Stretch]) -> Stretch:
    return Stretch(
        next(part.first for part in parts if len(part.digests)),
        np.concatenate([part.digests for part in parts]),
        np.concatenate([part.fingerprints for part in parts]),
    )


@contextlib.contextmanager
def told(host: str) -> Iterator[None]:
    """Turn what goes wrong with a call to a host into what an agent is told.

    Raises:
        RefusedError: as the protocol knows it.
    """
    try:
        yield
    except TimeoutError:
        text = f"host {host!r} says nothing: look after its merger and the network, and try again"
        raise RefusedError(errno.EAGAIN, text) from None
    except grpc.aio.AioRpcError as error:
        number = _ERRNO.get(error.code(), errno.EAGAIN)
        raise RefusedError(number, f"host {host!r}: {error.details()}") from error


async def _next(
    stream: AsyncIterator[pages_pb2.SnapshotResponse], seconds: float
) -> pages_pb2.SnapshotResponse | None:
    async with asyncio.timeout(seconds):
        return await anext(stream, None)


def _nonsense(host: str) -> RefusedError:
    return RefusedError(
        errno.EPROTO, f"host {host!r} told of pages that make no sense: upgrade the older merger"
    )
