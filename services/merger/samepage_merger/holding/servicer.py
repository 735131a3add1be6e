"""The gRPC API of `samepage-arenas`: converts, and delegates."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from samepage import errors
from samepage.arena import Arena
from samepage.v1 import arenas_pb2, arenas_pb2_grpc, scanner_pb2
from samepage_merger.holding.errors import IdleError, LimitError, RangeError
from samepage_merger.holding.held import SHARE_SECONDS, HeldArenas, find_range
from samepage_merger.holding.transfers import cloned, message, migrated

WRITTEN_BYTES = "samepage-written-bytes"
# The first that an error is an instance of.
STATUS: tuple[tuple[type[errors.SamepageError], grpc.StatusCode], ...] = (
    # It was deleted while the call ran.
    (errors.ClosedError, grpc.StatusCode.NOT_FOUND),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.MigratedError, grpc.StatusCode.NOT_FOUND),
    (errors.LostError, grpc.StatusCode.DATA_LOSS),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.NameTakenError, grpc.StatusCode.ALREADY_EXISTS),
    (RangeError, grpc.StatusCode.OUT_OF_RANGE),
    (LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.OutOfMemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ShareTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.CloneTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.FetchTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.EvictTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (IdleError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.UnsupportedKernelError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ProtocolVersionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.SealedError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PinnedError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ServiceUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.NotRunningError, grpc.StatusCode.UNAVAILABLE),
    (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.SamepageError, grpc.StatusCode.INTERNAL),
)

Context = grpc.aio.ServicerContext[Any, Any]


class ArenasServicer(arenas_pb2_grpc.ArenasServicer):
    """Serves samepage.v1.Arenas.

    Args:
        node: the host's name.
        idle_seconds: how long a stream may stand still for its client.
    """

    def __init__(self, node: str, held: HeldArenas, idle_seconds: float) -> None:
        self._node = node
        self._held = held
        self._idle_seconds = idle_seconds

    async def CreateArena(
        self, request: arenas_pb2.CreateArenaRequest, context: Context
    ) -> arenas_pb2.CreateArenaResponse:
        """A new arena."""
        async with _Telling(context):
            arena = await self._held.create(request.domain, request.arena, request.size)
            return arenas_pb2.CreateArenaResponse(arena=message(arena))

    async def WriteArena(
        self, request_iterator: AsyncIterator[arenas_pb2.WriteArenaRequest], context: Context
    ) -> arenas_pb2.WriteArenaResponse:
        """Bytes, chunk by chunk as they come."""
        written = 0
        requests = aiter(request_iterator)
        async with _Telling(context):
            try:
                with self._held.stream():
                    arena = await self._target(requests)
                    while (request := await self._next(requests)) is not None:
                        if request.WhichOneof("kind") != "chunk":
                            raise errors.InvalidArgumentError(
                                "only the first message may be no chunk"
                            )
                        chunk = request.chunk
                        self._held.write(arena, chunk.offset, chunk.data)
                        written += len(chunk.data)
            except errors.SamepageError:
                context.set_trailing_metadata(((WRITTEN_BYTES, str(written)),))
                raise
        return arenas_pb2.WriteArenaResponse(written_bytes=written)

    async def ReadArena(  # type: ignore[override]  # writes to the context, to time each write
        self, request: arenas_pb2.ReadArenaRequest, context: Context
    ) -> None:
        """Bytes, as fast as the client takes them."""
        async with _Telling(context):
            arena = self._held.find(request.domain, request.arena)
            offset = request.offset
            end = offset + find_range(arena, offset, request.length)
            with self._held.stream():
                while offset < end:
                    data = self._held.read(arena, offset, end - offset)
                    async with self._awake():
                        await context.write(arenas_pb2.ReadArenaResponse(offset=offset, data=data))
                    offset += len(data)

    async def ShareArena(
        self, request: arenas_pb2.ShareArenaRequest, context: Context
    ) -> arenas_pb2.ShareArenaResponse:
        """Equal pages made one."""
        asked = request.timeout_seconds if request.HasField("timeout_seconds") else SHARE_SECONDS
        async with _Telling(context):
            arena = self._held.find(request.domain, request.arena)
            report = await self._held.share(arena, asked)
            outcome = scanner_pb2.ShareOutcome(**dataclasses.asdict(report))
            return arenas_pb2.ShareArenaResponse(outcome=outcome)

    async def UnshareArena(
        self, request: arenas_pb2.UnshareArenaRequest, context: Context
    ) -> arenas_pb2.UnshareArenaResponse:
        """Every page private."""
        async with _Telling(context):
            await self._held.unshare(self._held.find(request.domain, request.arena))
            return arenas_pb2.UnshareArenaResponse()

    async def DiscardArena(
        self, request: arenas_pb2.DiscardArenaRequest, context: Context
    ) -> arenas_pb2.DiscardArenaResponse:
        """Pages that take no memory any more."""
        async with _Telling(context):
            arena = self._held.find(request.domain, request.arena)
            length = find_range(arena, request.offset, request.length)
            await self._held.discard(arena, request.offset, length)
            return arenas_pb2.DiscardArenaResponse()

    async def SealArena(
        self, request: arenas_pb2.SealArenaRequest, context: Context
    ) -> arenas_pb2.SealArenaResponse:
        """Read-only from now on."""
        async with _Telling(context):
            await self._held.seal(self._held.find(request.domain, request.arena))
            return arenas_pb2.SealArenaResponse()

    async def CloneArena(
        self, request: arenas_pb2.CloneArenaRequest, context: Context
    ) -> AsyncIterator[arenas_pb2.CloneArenaResponse]:
        """A copy of another host's arena."""
        async with _Telling(context), contextlib.aclosing(cloned(self._held, request)) as responses:
            async for response in responses:
                yield response

    async def MigrateArena(
        self, request: arenas_pb2.MigrateArenaRequest, context: Context
    ) -> AsyncIterator[arenas_pb2.CloneArenaResponse]:
        """Another host's arena, here."""
        async with (
            _Telling(context),
            contextlib.aclosing(migrated(self._held, request)) as responses,
        ):
            async for response in responses:
                yield response

    async def StatArena(
        self, request: arenas_pb2.StatArenaRequest, context: Context
    ) -> arenas_pb2.StatArenaResponse:
        """What the kernel shows."""
        async with _Telling(context):
            arena = self._held.find(request.domain, request.arena)
            stats = await self._held.stats(arena)
            return arenas_pb2.StatArenaResponse(
                arena=message(arena),
                pages=stats.pages,
                private_pages=stats.private,
                shared_pages=stats.shared,
                absent_pages=stats.absent,
                evicted_pages=stats.evicted,
                saved_bytes=stats.saved_bytes,
            )

    async def ListHeldArenas(
        self, request: arenas_pb2.ListHeldArenasRequest, context: Context
    ) -> arenas_pb2.ListHeldArenasResponse:
        """All arenas, or those of a domain."""
        return arenas_pb2.ListHeldArenasResponse(
            arenas=map(message, self._held.arenas(request.domain))
        )

    async def DeleteArena(
        self, request: arenas_pb2.DeleteArenaRequest, context: Context
    ) -> arenas_pb2.DeleteArenaResponse:
        """The end of an arena."""
        async with _Telling(context):
            await self._held.delete(self._held.find(request.domain, request.arena))
            return arenas_pb2.DeleteArenaResponse()

    async def GetArenasStatus(
        self, request: arenas_pb2.GetArenasStatusRequest, context: Context
    ) -> arenas_pb2.GetArenasStatusResponse:
        """What is held, and the limits."""
        limits = self._held.limits
        return arenas_pb2.GetArenasStatusResponse(
            node=self._node,
            arenas=len(self._held.arenas()),
            arenas_max=limits.arenas,
            held_bytes=self._held.held_bytes,
            hold_limit_bytes=limits.held_bytes,
            streams=self._held.streams,
            streams_max=limits.streams,
            cpu_seconds=time.process_time(),
        )

    async def _target(self, requests: AsyncIterator[arenas_pb2.WriteArenaRequest]) -> Arena:
        first = await self._next(requests)
        if first is None or first.WhichOneof("kind") != "target":
            raise errors.InvalidArgumentError("the first message must hold a target")
        return self._held.find(first.target.domain, first.target.arena)

    async def _next(
        self, requests: AsyncIterator[arenas_pb2.WriteArenaRequest]
    ) -> arenas_pb2.WriteArenaRequest | None:
        """The next message; None when the client has sent all."""
        async with self._awake():
            return await anext(requests, None)

    @contextlib.asynccontextmanager
    async def _awake(self) -> AsyncIterator[None]:
        """Wait for the client, but not for ever.

        Raises:
            IdleError: it took too long.
        """
        try:
            async with asyncio.timeout(self._idle_seconds):
                yield
        except TimeoutError:
            raise IdleError(
                f"the stream stood still for {self._idle_seconds:g} s: call again, from where it "
                "stopped"
            ) from None


class _Telling:
    """Tells the client of an error inside, by STATUS."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, errors.SamepageError):
            code = next(code for kind, code in STATUS if isinstance(error, kind))
            await self._context.abort(code, str(error))
