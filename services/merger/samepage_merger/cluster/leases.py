"""What other hosts hold for this one: the owner's side of holds (docs/cluster.md).

`Grants` are the books: which host granted which digests. They are this merger's memory of what it
was told, no more: the holders' own files are what counts, and after a restart the grants are found
again by asking for the same holds anew.

`Leases` are the calls: they hold, renew and release at other hosts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import grpc
import numpy as np
import structlog

from samepage.daemon.failpoints import failpoint
from samepage.v1 import pages_pb2
from samepage_merger.cluster.away import Digests, Mask
from samepage_merger.cluster.digests import Fingerprints
from samepage_merger.cluster.hosts import Host, HostAwayError, Hosts
from samepage_merger.cluster.keys import Keys, keys_of
from samepage_merger.cluster.marks import MarkTable, digests_named, names_of
from samepage_merger.config import HOSTS_MAX
from samepage_merger.domains import Domain
from samepage_merger.runs import Int64s

HOLD_PAGES = 4096

_ANSWER_SECONDS = 10.0

log = structlog.get_logger(__name__)


class Grants:
    """Which hosts hold which digests of which domain for this host, at 40 bytes a digest."""

    def __init__(self) -> None:
        self._tables: dict[Domain, MarkTable] = {}
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Digests that are held."""
        return sum(map(len, self._tables.values()))

    def hosts(self) -> list[str]:
        """Return the hosts that may hold anything."""
        return list(self._numbers)

    def of_host(self, host: str) -> int:
        """Return how many digests a host holds, in all domains."""
        mark = self._mark(host)
        return sum(int(np.count_nonzero(table.all()[1] & mark)) for table in self._tables.values())

    def add(self, domain: Domain, host: str, digests: Digests) -> bool:
        """Note that a host holds digests; False when there are too many hosts to note it."""
        if host not in self._numbers:
            free = set(range(HOSTS_MAX)) - set(self._numbers.values())
            if not free:
                return False
            self._numbers[host] = min(free)
        self._table(domain).set(names_of(digests), self._mark(host))
        return True

    def remove(self, domain: Domain, host: str, digests: Digests) -> None:
        """Note that a host does not hold digests."""
        if host in self._numbers:
            self._table(domain).clear(names_of(digests), self._mark(host))

    def forget(self, host: str) -> None:
        """Note that a host holds nothing any more."""
        for table in self._tables.values():
            table.clear(table.all()[0], self._mark(host))
        self._numbers.pop(host, None)

    def of(self, domain: Domain, host: str) -> Digests:
        """Return what a host holds of a domain."""
        names, marks = self._table(domain).all()
        return digests_named(names[(marks & self._mark(host)) != 0])

    def holders(self, domain: Domain, digests: Digests) -> list[tuple[str, Mask]]:
        """Return the hosts that hold some of these digests, and which of them."""
        marks = self._table(domain).marks(names_of(digests))
        found = [(host, (marks & self._mark(host)) != 0) for host in self._numbers]
        return [(host, mask) for host, mask in found if mask.any()]

    def count(self, domain: Domain, digests: Digests, hosts: Iterable[str]) -> Int64s:
        """Return how many of these hosts hold each digest."""
        marks = self._table(domain).marks(names_of(digests))
        count = np.zeros(marks.size, np.int64)
        for host in hosts:
            count += (marks & self._mark(host)) != 0
        return count

    def unneeded(self, domain: Domain, needed: Keys) -> list[tuple[str, Digests]]:
        """Return what hosts hold and is not among what is needed, by keys (ascending)."""
        names, marks = self._table(domain).all()
        free = ~np.isin(keys_of(digests_named(names)), needed)
        names, marks = names[free], marks[free]
        found = [
            (host, digests_named(names[(marks & self._mark(host)) != 0])) for host in self._numbers
        ]
        return [(host, digests) for host, digests in found if len(digests)]

    def _table(self, domain: Domain) -> MarkTable:
        return self._tables.setdefault(domain, MarkTable())

    def _mark(self, host: str) -> np.uint64:
        number = self._numbers.get(host)
        return np.uint64(0) if number is None else np.uint64(1 << number)


class Leases:
    """Calls to the hosts that hold pages for this one.

    Args:
        lease_seconds: how long a hold lasts unless renewed.
        store_id: of this host, which other hosts of its name have not.
    """

    def __init__(self, hosts: Hosts, grants: Grants, lease_seconds: float, store_id: bytes) -> None:
        self._node = hosts.own
        self._store_id = store_id
        self._grants = grants
        self._lease_ms = min(round(lease_seconds * 1000), 2**32 - 1)

    async def hold(
        self, domain: Domain, host: Host, digests: Digests, fingerprints: Fingerprints | None = None
    ) -> None:
        """Ask a host to hold pages; what it says is in the grants afterwards."""
        for low in range(0, len(digests), HOLD_PAGES):
            part = slice(low, low + HOLD_PAGES)
            request = pages_pb2.HoldRequest(
                domain_id=domain.id,
                owner=self._node,
                store_id=self._store_id,
                digests=digests[part].tobytes(),
                fingerprints=b"" if fingerprints is None else fingerprints[part].tobytes(),
                lease_ms=self._lease_ms,
            )
            try:
                answer = await host.stub.Hold(request, timeout=_ANSWER_SECONDS)
                held = _mask(answer.held, len(digests[part]))
            except (grpc.aio.AioRpcError, HostAwayError) as error:
                log.info("a host does not hold pages", host=host.name, why=_why(error))
                return
            self._grants.remove(domain, host.name, digests[part][~held])
            self._grants.add(domain, host.name, digests[part][held])
            failpoint("leases.granted")

    async def renew(self, host: Host) -> bool | None:
        """Extend a host's lease; return whether it holds what the books say, None when it does not
        answer."""
        request = pages_pb2.RenewRequest(
            owner=self._node, store_id=self._store_id, lease_ms=self._lease_ms
        )
        try:
            answer = await host.stub.Renew(request, timeout=_ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            log.info("a lease could not be renewed", host=host.name, why=_why(error))
            return None
        return bool(answer.holds == self._grants.of_host(host.name))

    async def release(
        self, domain: Domain, hosts: Sequence[Host], name: str, digests: Digests
    ) -> None:
        """Let a host (none, or one, of this name) hold pages no longer; one that does not answer
        does so when the lease ends."""
        self._grants.remove(domain, name, digests)
        for host, low in itertools.product(hosts, range(0, len(digests), HOLD_PAGES)):
            request = pages_pb2.ReleaseRequest(
                domain_id=domain.id,
                owner=self._node,
                store_id=self._store_id,
                digests=digests[low : low + HOLD_PAGES].tobytes(),
            )
            try:
                await host.stub.Release(request, timeout=_ANSWER_SECONDS)
            except grpc.aio.AioRpcError as error:
                log.info("a hold could not be released", host=name, why=_why(error))
                return


def _mask(packed: bytes, count: int) -> Mask:
    if len(packed) != count:
        raise HostAwayError("it answered for other pages than was asked: upgrade the older merger")
    held: Mask = np.frombuffer(packed, np.uint8) == 1
    return held


def _why(error: Exception) -> str | None:
    return error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
