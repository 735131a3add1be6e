"""Asks the host's scanner where on this host pages with some fingerprints are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import structlog

from samepage.daemon.roles import Role
from samepage.daemon.tls import Channels, Tls
from samepage.v1 import scanner_pb2, scanner_pb2_grpc
from samepage_merger.arena import Arena
from samepage_merger.cluster.digests import Fingerprints
from samepage_merger.domains import Domain
from samepage_merger.merging import FindArena
from samepage_merger.runs import Indices, Int64s

_ANSWER_SECONDS = 5.0
_LOCATE_MAX = 1 << 16
_PLACE = np.dtype([("number", "<u4"), ("arena", "<u4"), ("page", "<u8")])

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """Pages of one arena, and which of the fingerprints each of them should have."""

    arena: Arena
    numbers: Indices
    pages: Int64s


class Locator:
    """A client of the scanner.

    Args:
        target: its gRPC target, on this host.
        find: looks up an arena of the merger's.
        tls: for a scanner that is not at a unix socket; None: without.
    """

    def __init__(self, target: str, find: FindArena, tls: Tls | None = None) -> None:
        self._target = target
        self._channels = Channels(Role.SCANNER, tls)
        self._find = find

    def _stub(self) -> scanner_pb2_grpc.ScannerAsyncStub:
        return scanner_pb2_grpc.ScannerStub(self._channels.get(self._target))

    async def locate(self, domain: Domain, fingerprints: Fingerprints) -> list[Places]:
        """Return where pages should be, as the scanner saw them last; nothing when it is away."""
        found: list[Places] = []
        for low in range(0, len(fingerprints), _LOCATE_MAX):
            part = fingerprints[low : low + _LOCATE_MAX]
            request = scanner_pb2.LocateRequest(domain_id=domain.id, fingerprints=part.tobytes())
            try:
                answer = await self._stub().Locate(request, timeout=_ANSWER_SECONDS)
            except grpc.aio.AioRpcError as error:
                log.info("the scanner is away: it locates no pages", why=error.details())
                break
            found += self._places(domain, answer, low)
        return found

    async def close(self) -> None:
        """Let go of the connection."""
        await self._channels.close()

    def _places(
        self, domain: Domain, answer: scanner_pb2.LocateResponse, low: int
    ) -> Iterator[Places]:
        places = np.frombuffer(answer.places, _PLACE)
        for number in np.unique(places["arena"]).tolist():
            key = answer.arenas[number]
            arena = self._find(key.agent, key.arena)
            if arena is None or arena.domain is not domain:
                continue
            mine = places[(places["arena"] == number) & (places["page"] < arena.pages)]
            yield Places(arena, mine["number"].astype(np.intp) + low, mine["page"].astype(np.int64))
