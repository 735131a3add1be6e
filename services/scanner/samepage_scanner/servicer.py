"""The scanner's gRPC API (proto/samepage/v1/scanner.proto)."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import resource
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import grpc

from samepage.daemon import secrets
from samepage.daemon.config import ConfigError
from samepage.daemon.policies import Policies
from samepage.reports import ShareReport
from samepage.v1 import scanner_pb2, scanner_pb2_grpc
from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Books
from samepage_scanner.config import Config
from samepage_scanner.estimate import Estimate, Stretches, estimate
from samepage_scanner.locate import locate
from samepage_scanner.merging import MergerClient
from samepage_scanner.passes import Passes, ShareRefusedError
from samepage_scanner.publisher import IndexAwayError, Publisher

DEFAULT_DOMAIN = "default"
LOCATE_MAX = 1 << 16

_STATUS = {
    errno.ENOENT: grpc.StatusCode.NOT_FOUND,
    errno.ENOTCONN: grpc.StatusCode.UNAVAILABLE,
    errno.ETIMEDOUT: grpc.StatusCode.UNAVAILABLE,
}

Context = grpc.aio.ServicerContext[Any, Any]


class ScannerServicer(scanner_pb2_grpc.ScannerServicer):
    """Converts requests, and hands them on."""

    def __init__(
        self,
        node: str,
        books: Books,
        passes: Passes,
        merger: MergerClient,
        publisher: Publisher | None,
        policies: Policies[Config],
    ) -> None:
        self._node = node
        self._books = books
        self._passes = passes
        self._merger = merger
        self._publisher = publisher
        self._policies = policies

    async def ListScannedArenas(
        self, request: scanner_pb2.ListScannedArenasRequest, context: Context
    ) -> scanner_pb2.ListScannedArenasResponse:
        """The arenas, ordered by domain and name."""
        arenas = sorted(self._books.arenas(), key=lambda arena: (arena.domain.name, arena.name))
        return scanner_pb2.ListScannedArenasResponse(
            arenas=[
                scanner_pb2.ScannedArena(
                    name=arena.name,
                    domain=arena.domain.name,
                    pid=arena.agent.peer.pid,
                    pages=len(arena.pages),
                    passes=arena.passes,
                    stable_pages=arena.pages.count_stable(),
                )
                for arena in arenas
            ]
        )

    async def Share(
        self, request: scanner_pb2.ShareRequest, context: Context
    ) -> scanner_pb2.ShareResponse:
        """One pass over the domain; the outcome of one arena, or of all together."""
        name = request.domain or DEFAULT_DOMAIN
        domain = self._books.domains.get(name)
        arenas = domain.arenas if domain is not None else []
        if domain is not None and request.arena:
            arenas = domain.find(request.arena)
        if domain is None or not arenas:
            what = f"arena {request.arena!r}" if request.arena else "arena"
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"no {what} in domain {name!r}")
        try:
            reports = await self._passes.share(domain, list(arenas))
        except ShareRefusedError as error:
            code = _STATUS.get(error.error, grpc.StatusCode.INTERNAL)
            await _abort(context, code, error.text)
        return scanner_pb2.ShareResponse(outcome=_sum(reports))

    async def EstimateSavings(
        self, request: scanner_pb2.EstimateSavingsRequest, context: Context
    ) -> AsyncIterator[scanner_pb2.EstimateSavingsResponse]:
        """What looking and matching find, without a merge."""
        domains = sorted(self._books.domains)
        if request.domain and request.domain not in domains:
            text = f"no arena in domain {request.domain!r}"
            await _abort(context, grpc.StatusCode.NOT_FOUND, text)
        await self._passes.look()
        for name in [request.domain] if request.domain else domains:
            domain = self._books.domains.get(name)
            if domain is not None and domain.arenas:
                yield _estimate(name, await estimate(domain.arenas, request.stretches))

    async def GetScannerStatus(
        self, request: scanner_pb2.GetScannerStatusRequest, context: Context
    ) -> scanner_pb2.GetScannerStatusResponse:
        """Counters since start, and what the scanner is connected to."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return scanner_pb2.GetScannerStatusResponse(
            node=self._node,
            agents=len(self._books.agents),
            arenas=sum(1 for _ in self._books.arenas()),
            pages=self._books.pages,
            pages_scanned=self._books.pages_scanned,
            passes=self._passes.passes,
            index_connected=self._publisher is not None and self._publisher.connected,
            merger_connected=self._merger.connected,
            published=self._publisher.published if self._publisher is not None else 0,
            cpu_seconds=used.ru_utime + used.ru_stime,
            background_cpu_percent=self._passes.budget.percent,
            index_refusal=self._publisher.refusal if self._publisher is not None else "",
        )

    async def GetOverlap(
        self, request: scanner_pb2.GetOverlapRequest, context: Context
    ) -> scanner_pb2.GetOverlapResponse:
        """What the index knows of this host's pages on others, most first."""
        if self._publisher is None:
            text = "this scanner has no index: set its `index`"
            await _abort(context, grpc.StatusCode.UNAVAILABLE, text)
        domain = request.domain or (DEFAULT_DOMAIN if request.arena else "")
        arenas = self._books.select(domain, request.arena)
        if request.arena and not arenas:
            text = f"no arena {request.arena!r} in domain {domain!r}"
            await _abort(context, grpc.StatusCode.NOT_FOUND, text)
        try:
            held, distinct = await self._publisher.overlap(arenas)
        except IndexAwayError as error:
            text = f"the index is away: {error}; try again later"
            await _abort(context, grpc.StatusCode.UNAVAILABLE, text)
        return scanner_pb2.GetOverlapResponse(
            hosts=[
                scanner_pb2.HostOverlap(host=host, pages=pages)
                for host, pages in held.most_common()
            ],
            distinct_pages=distinct,
        )

    async def Locate(
        self, request: scanner_pb2.LocateRequest, context: Context
    ) -> scanner_pb2.LocateResponse:
        """Where on this host pages are."""
        if len(request.domain_id) != secrets.DOMAIN_ID_BYTES:
            text = f"domain_id has {len(request.domain_id)} bytes instead of 16"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, text)
        count, rest = divmod(len(request.fingerprints), fp.FINGERPRINT_BYTES)
        if rest or count > LOCATE_MAX:
            text = (
                f"fingerprints has {len(request.fingerprints)} bytes: give up to {LOCATE_MAX}, of"
                " 16 bytes each"
            )
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, text)
        domain = self._books.identified(request.domain_id)
        arenas = [] if domain is None else list(domain.arenas)
        pages = [arena.pages for arena in arenas]
        places = await asyncio.to_thread(locate, pages, fp.parse(request.fingerprints))
        return scanner_pb2.LocateResponse(
            arenas=[
                scanner_pb2.LocatedArena(agent=arena.agent.peer.agent, arena=arena.number)
                for arena in arenas
            ],
            places=places.tobytes(),
        )

    async def GetPolicy(
        self, request: scanner_pb2.GetScannerPolicyRequest, context: Context
    ) -> scanner_pb2.GetScannerPolicyResponse:
        """What may change while the scanner runs."""
        policy = self._policies.fill(scanner_pb2.ScannerPolicy())
        return scanner_pb2.GetScannerPolicyResponse(policy=policy)

    async def SetPolicy(
        self, request: scanner_pb2.SetScannerPolicyRequest, context: Context
    ) -> scanner_pb2.SetScannerPolicyResponse:
        """Change it, and say what it is then."""
        try:
            self._policies.change(request.policy)
        except ConfigError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        policy = self._policies.fill(scanner_pb2.ScannerPolicy())
        return scanner_pb2.SetScannerPolicyResponse(policy=policy)


def _estimate(domain: str, found: Estimate) -> scanner_pb2.EstimateSavingsResponse:
    return scanner_pb2.EstimateSavingsResponse(
        domain=domain,
        arenas=[
            scanner_pb2.ArenaEstimate(
                name=each.arena.name,
                pid=each.arena.agent.peer.pid,
                pages=each.pages,
                absent=each.absent,
                shared=each.shared,
                zero=each.zero,
                duplicate=each.duplicate,
                same_process=each.same_process,
                same_host=each.duplicate - each.same_process,
                kept=each.kept,
                runs=each.runs,
                stretches=_stretches(each.stretches),
            )
            for each in found.arenas
        ],
        runs=[
            scanner_pb2.RunLengths(length=length, pages=pages)
            for length, pages in found.lengths.items()
        ],
    )


def _stretches(found: Stretches | None) -> list[scanner_pb2.Stretch]:
    if found is None:
        return []
    names = ("pages", "absent", "shared", "zero", "duplicate")
    rows = zip(*(getattr(found, name).tolist() for name in names), strict=True)
    return [scanner_pb2.Stretch(**dict(zip(names, row, strict=True))) for row in rows]


async def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError("abort() raises")


def _sum(reports: Sequence[ShareReport]) -> scanner_pb2.ShareOutcome:
    columns = zip(*(dataclasses.astuple(report) for report in reports), strict=True)
    names = (field.name for field in dataclasses.fields(ShareReport))
    return scanner_pb2.ShareOutcome(**dict(zip(names, map(sum, columns), strict=True)))
