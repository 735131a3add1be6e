"""What the subcommands ask the daemons of a host."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samepage import host as merger
from samepage import rpc
from samepage.cli.places import Host
from samepage.errors import SamepageError
from samepage.reports import HostAccount, NodeStats, ShareReport
from samepage.v1 import (
    arenas_pb2,
    arenas_pb2_grpc,
    index_pb2,
    index_pb2_grpc,
    merger_pb2,
    merger_pb2_grpc,
    scanner_pb2,
    scanner_pb2_grpc,
)

# All memory of a host may have to be matched.
_ESTIMATE_SECONDS = 120.0

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class ScannerStats:
    """A scanner's status; see proto/samepage/v1/scanner.proto."""

    node: str
    agents: int
    arenas: int
    pages: int
    pages_scanned: int
    passes: int
    index_connected: bool
    merger_connected: bool
    published: int
    cpu_seconds: float
    background_cpu_percent: float
    index_refusal: str


@dataclass(frozen=True)
class ArenasServiceStats:
    """What the helper holds for gRPC clients; see proto/samepage/v1/arenas.proto."""

    node: str
    arenas: int
    arenas_max: int
    held_bytes: int
    hold_limit_bytes: int
    streams: int
    streams_max: int
    cpu_seconds: float


@dataclass(frozen=True)
class Stretch:
    """Neighbouring pages of an arena, and what they are; see proto/samepage/v1/scanner.proto."""

    pages: int
    absent: int
    shared: int
    zero: int
    duplicate: int


@dataclass(frozen=True)
class ArenaEstimate:
    """What a share would make of an arena, in pages; see proto/samepage/v1/scanner.proto."""

    name: str
    pid: int
    pages: int
    absent: int
    shared: int
    zero: int
    duplicate: int
    same_process: int
    same_host: int
    kept: int
    runs: int
    stretches: list[Stretch]


@dataclass(frozen=True)
class DomainEstimate:
    """The arenas of a domain, and the pages that would be saved by length of run."""

    domain: str
    arenas: list[ArenaEstimate]
    runs: dict[int, int]

    def to_json(self) -> dict[str, object]:
        """For programs: the counts."""
        found = dataclasses.asdict(self)
        for arena in found["arenas"]:
            del arena["stretches"]
        return {**found, "runs": {str(k): v for k, v in self.runs.items()}}


@dataclass(frozen=True)
class IndexStats:
    """An index's sizes; see proto/samepage/v1/index.proto."""

    entries: int
    fingerprints: int
    stored_bytes: int
    hosts: int
    store: str


@dataclass(frozen=True)
class Overlap:
    """Distinct pages of a host or an arena, and how many of them each other host holds too."""

    distinct_pages: int
    hosts: dict[str, int]


@dataclass(frozen=True)
class Evicted:
    """What became of pages that were to leave; see EvictResponse in merger.proto."""

    held_elsewhere: int = 0
    spilled: int = 0
    kept: int = 0
    no_room: int = 0


@dataclass(frozen=True)
class HostStatus:
    """What the daemons of a host say; None and an error for one that does not answer.

    A host need not have a helper that holds arenas: None without an error then.
    """

    host: Host
    merger: NodeStats | None
    account: HostAccount | None
    scanner: ScannerStats | None
    arenas: ArenasServiceStats | None
    errors: tuple[str, ...]


def host_status(host: Host) -> HostStatus:
    """Ask the daemons of a host; never raises for one that is away."""
    found: list[str] = []
    merger_stats: NodeStats | None = None
    account: HostAccount | None = None
    scanner: ScannerStats | None = None
    arenas: ArenasServiceStats | None = None
    try:
        merger_stats = merger.node_stats(str(host.directory))
        account = merger.host_account(str(host.directory))
    except SamepageError as error:
        found.append(str(error))
    try:
        scanner = scanner_stats(host)
    except SamepageError as error:
        found.append(str(error))
    if has_arenas_service(host):
        try:
            arenas = arenas_service_stats(host)
        except SamepageError as error:
            found.append(str(error))
    return HostStatus(host, merger_stats, account, scanner, arenas, tuple(found))


def has_arenas_service(host: Host) -> bool:
    """Whether a helper that holds arenas belongs to the host."""
    return bool(host.arenas) or (host.directory / rpc.ARENAS_SOCKET).exists()


def arenas_service_stats(host: Host) -> ArenasServiceStats:
    """Ask the helper that holds arenas.

    Raises:
        NotRunningError, ServiceUnavailableError: it does not answer.
    """
    with rpc.channel(rpc.socket_address(host.directory, rpc.ARENAS_SOCKET)) as channel:
        answer = arenas_pb2_grpc.ArenasStub(channel).GetArenasStatus(
            arenas_pb2.GetArenasStatusRequest(), timeout=rpc.TIMEOUT_SECONDS
        )
    return ArenasServiceStats(
        **{name: getattr(answer, name) for name in _fields(ArenasServiceStats)}
    )


def estimate_savings(host: Host, stretches: int = 0) -> list[DomainEstimate]:
    """Ask the scanner what sharing would save, by domain; of each arena also by stretches.

    Raises:
        NotRunningError, ServiceUnavailableError: it does not answer.
    """
    with rpc.channel(rpc.socket_address(host.directory, rpc.SCANNER_SOCKET)) as channel:
        answers = scanner_pb2_grpc.ScannerStub(channel).EstimateSavings(
            scanner_pb2.EstimateSavingsRequest(stretches=stretches), timeout=_ESTIMATE_SECONDS
        )
        return [
            DomainEstimate(
                answer.domain,
                [_arena_estimate(arena) for arena in answer.arenas],
                {runs.length: runs.pages for runs in answer.runs},
            )
            for answer in answers
        ]


def _arena_estimate(answer: scanner_pb2.ArenaEstimate) -> ArenaEstimate:
    values = {name: getattr(answer, name) for name in _fields(ArenaEstimate)}
    names = _fields(Stretch)
    values["stretches"] = [
        Stretch(**{name: getattr(stretch, name) for name in names}) for stretch in answer.stretches
    ]
    return ArenaEstimate(**values)


def scanner_stats(host: Host) -> ScannerStats:
    """Ask the scanner.

    Raises:
        NotRunningError, ServiceUnavailableError: it does not answer.
    """
    with rpc.channel(rpc.socket_address(host.directory, rpc.SCANNER_SOCKET)) as channel:
        answer = scanner_pb2_grpc.ScannerStub(channel).GetScannerStatus(
            scanner_pb2.GetScannerStatusRequest(), timeout=rpc.TIMEOUT_SECONDS
        )
    return ScannerStats(**{name: getattr(answer, name) for name in _fields(ScannerStats)})


def share(host: Host, domain: str, arena: str, timeout: float) -> ShareReport:
    """Have the scanner look now at one arena (or, with an empty name, all of the domain).

    Raises:
        NotFoundError: no such arena.
        NotRunningError, ServiceUnavailableError: a daemon is away, or too slow.
    """
    with rpc.channel(rpc.socket_address(host.directory, rpc.SCANNER_SOCKET)) as channel:
        request = scanner_pb2.ShareRequest(domain=domain, arena=arena)
        answer = scanner_pb2_grpc.ScannerStub(channel).Share(request, timeout=timeout)
    return ShareReport(**{name: getattr(answer.outcome, name) for name in _fields(ShareReport)})


def overlap(host: Host, domain: str = "", arena: str = "") -> Overlap:
    """Ask how much of the host's memory, or of one arena's, other hosts hold.

    Raises:
        NotFoundError: no such arena.
        NotRunningError, ServiceUnavailableError: the scanner or the index is away.
    """
    with rpc.channel(rpc.socket_address(host.directory, rpc.SCANNER_SOCKET)) as channel:
        answer = scanner_pb2_grpc.ScannerStub(channel).GetOverlap(
            scanner_pb2.GetOverlapRequest(domain=domain, arena=arena), timeout=rpc.TIMEOUT_SECONDS
        )
    return Overlap(answer.distinct_pages, {other.host: other.pages for other in answer.hosts})


def forget_host(host: Host, gone: str) -> int:
    """Tell a merger that another host is gone; return how many arenas are its host's for that.

    Raises:
        SamepageError: the other host is in the cluster.
        NotRunningError, ServiceUnavailableError: the merger, or the index, does not answer.
    """
    with rpc.channel(rpc.socket_address(host.directory, rpc.MERGER_SOCKET)) as channel:
        answer = merger_pb2_grpc.MergerStub(channel).ForgetHost(
            merger_pb2.ForgetHostRequest(host=gone), timeout=_ESTIMATE_SECONDS
        )
    return answer.arenas


def index_stats(address: str) -> IndexStats:
    """Ask the index.

    Raises:
        ServiceUnavailableError: it, or its Redis, is away.
    """
    with rpc.channel(address, "index") as channel:
        answer = index_pb2_grpc.IndexStub(channel).GetIndexStats(
            index_pb2.GetIndexStatsRequest(), timeout=rpc.TIMEOUT_SECONDS
        )
    return IndexStats(**{name: getattr(answer, name) for name in _fields(IndexStats)})


def _fields(kind: type[DataclassInstance]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def evict(host: Host, domain: str, arena: str) -> Evicted:
    """Have an arena's pages leave the host.

    Raises:
        NotFoundError: the host has no such arena.
        NotRunningError, ServiceUnavailableError: the merger does not answer.
    """
    total: Counter[str] = Counter()
    with rpc.channel(rpc.socket_address(host.directory, rpc.MERGER_SOCKET)) as channel:
        request = merger_pb2.EvictArenaRequest(domain=domain, arena=arena)
        for answer in merger_pb2_grpc.MergerStub(channel).EvictArena(request):
            total.update({name: getattr(answer, name) for name in _fields(Evicted)})
    return Evicted(**total)
