"""Arenas that are brought here from other hosts, and how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from samepage.arena import Arena
from samepage.reports import CloneProgress
from samepage.v1 import arenas_pb2
from samepage_merger.holding.held import Bring, HeldArenas, Report

FREEZE_MS = 500
# A call ends with its client, not with time.
TIMEOUT_SECONDS = 86_400.0


async def cloned(
    held: HeldArenas, request: arenas_pb2.CloneArenaRequest
) -> AsyncGenerator[arenas_pb2.CloneArenaResponse]:
    """Make the copy that is asked for, and tell how far it is.

    Raises:
        SamepageError: as HeldArenas.bring.
    """

    def work(report: Report) -> Arena:
        return held.node.clone_arena(
            f"{request.source_host}/{request.source_arena}",
            name=request.arena or None,
            domain=request.domain or None,
            lazy=request.lazy,
            timeout=TIMEOUT_SECONDS,
            progress=report,
        )

    async for response in _brought(held, request, work, copy=True):
        yield response


async def migrated(
    held: HeldArenas, request: arenas_pb2.MigrateArenaRequest
) -> AsyncGenerator[arenas_pb2.CloneArenaResponse]:
    """Move the arena that is asked for, and tell how far it is.

    Raises:
        SamepageError: as HeldArenas.bring.
    """

    def work(report: Report) -> Arena:
        return held.node.migrate_arena(
            f"{request.source_host}/{request.source_arena}",
            name=request.arena or None,
            domain=request.domain or None,
            max_freeze=(request.max_freeze_milliseconds or FREEZE_MS) / 1000,
            timeout=TIMEOUT_SECONDS,
            progress=report,
        )

    async for response in _brought(held, request, work, copy=False):
        yield response


async def _brought(
    held: HeldArenas,
    request: arenas_pb2.CloneArenaRequest | arenas_pb2.MigrateArenaRequest,
    work: Bring,
    *,
    copy: bool,
) -> AsyncGenerator[arenas_pb2.CloneArenaResponse]:
    """Tell the newest of each moment; the last response has the arena."""
    news = asyncio.Event()
    last = CloneProgress(0, 0, 0)

    def told(progress: CloneProgress) -> None:
        nonlocal last
        last = progress
        news.set()

    name = request.arena or request.source_arena
    bringing = asyncio.ensure_future(held.bring(request.domain, name, work, told, copy=copy))
    bringing.add_done_callback(lambda _: news.set())
    try:
        while not bringing.done():
            await news.wait()
            news.clear()
            if not bringing.done():
                yield _response(last)
        arena = bringing.result()
        yield _response(last, message(arena))
    finally:
        bringing.cancel()
        await asyncio.wait({bringing})


def message(arena: Arena) -> arenas_pb2.HeldArena:
    """Return what the API says of an arena."""
    return arenas_pb2.HeldArena(
        domain=arena.domain, arena=arena.name, size=arena.size, sealed=arena.sealed
    )


def _response(
    progress: CloneProgress, arena: arenas_pb2.HeldArena | None = None
) -> arenas_pb2.CloneArenaResponse:
    return arenas_pb2.CloneArenaResponse(
        local_bytes=progress.local_bytes,
        fetched_bytes=progress.fetched_bytes,
        missing_bytes=progress.missing_bytes,
        freeze_microseconds=progress.freeze_us,
        arena=arena,
    )
