"""The other hosts' mergers: who there is, as the index says, and the way to each.

Streams (streams.py) are kept open to each holder that was asked, so that one page costs one message
each way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable

import grpc
import numpy as np
import structlog

from samepage.daemon.roles import Role
from samepage.daemon.tls import Channels, Tls
from samepage.v1 import index_pb2, index_pb2_grpc, pages_pb2, pages_pb2_grpc
from samepage_merger.cluster.away import Mask
from samepage_merger.cluster.digests import Fingerprints
from samepage_merger.cluster.fetched import Fetched
from samepage_merger.cluster.streams import RESPONSE_MAX, FetchStream, StreamEndedError, Streams

LOOKUP_MAX = 1 << 16

_INDEX_SECONDS = 5.0
_TABLE_SECONDS = 2.0
_STREAMS_KEPT = 16
_AVOID_SECONDS = 300.0
_REST_SECONDS = 0.5
_REST_MAX_SECONDS = 10.0
_OPTIONS = (
    ("grpc.max_receive_message_length", RESPONSE_MAX),
    # A response of 512 pages comes in one go, not in windows of 64 KiB.
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

log = structlog.get_logger(__name__)


class HostAwayError(Exception):
    """A host does not answer, or not as it should: `args[0]` says why."""


class Host:
    """One other host's merger.

    Attributes:
        name: in the index.
        address: of its merger.
        lies: pages it sent that did not have their digest.
    """

    def __init__(self, name: str, address: str, channels: Channels, tls: Tls | None = None) -> None:
        self.name = name
        self.address = address
        self.lies = 0
        self._channels = channels
        self._streams = Streams(name, tls)
        self._idle: list[tuple[grpc.aio.Channel, FetchStream]] = []
        self._avoided_until = 0.0
        self._rest = _REST_SECONDS

    @property
    def avoided(self) -> bool:
        """Whether it lied, or did not answer, not long ago."""
        return time.monotonic() < self._avoided_until

    @property
    def unreachable(self) -> bool:
        """Whether pages come over gRPC, since its data connections cannot be reached."""
        return self._streams.unreachable

    @property
    def stub(self) -> pages_pb2_grpc.PagesAsyncStub:
        """For every call but Fetch; take it anew for each."""
        return pages_pb2_grpc.PagesStub(self._channels.get(self.address))

    async def fetch(self, request: pages_pb2.FetchRequest, seconds: float) -> Fetched:
        """Ask for pages.

        Raises:
            HostAwayError: it did not answer in time, or sent what is no answer.
        """
        channel = self._channels.get(self.address)
        try:
            async with asyncio.timeout(seconds):
                response = await self._ask(channel, request)
        except TimeoutError:
            raise self._away("it does not answer") from None
        if len(response.found) * 32 != len(request.digests) or len(response.pages) != 4096 * sum(
            response.found
        ):
            self.lied(1, "an answer of the wrong length")
            raise HostAwayError("it sent an answer of the wrong length")
        self._rest = _REST_SECONDS
        return response

    def lied(self, pages: int, why: str) -> None:
        """Count pages that did not have their digest, and avoid the host for a while."""
        self.lies += pages
        self._avoided_until = time.monotonic() + _AVOID_SECONDS
        log.error(
            "a holder sends wrong pages: it is avoided for a while; see whether its memory, or the"
            " network, is broken, and who runs it",
            host=self.name,
            address=self.address,
            pages=pages,
            why=why,
        )

    def close(self) -> None:
        """End the streams."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _ask(self, channel: grpc.aio.Channel, request: pages_pb2.FetchRequest) -> Fetched:
        while self._idle:
            of, stream = self._idle.pop()
            if of is channel and time.monotonic() < stream.until:
                # It may have ended while nobody used it, which says nothing of the host now.
                with contextlib.suppress(StreamEndedError):
                    return await self._ask_on(channel, stream, request)
            else:
                stream.close()
        try:
            stream = await self._streams.open(channel, self.address)
            return await self._ask_on(channel, stream, request)
        except StreamEndedError as error:
            raise self._away(error.args[0]) from error

    async def _ask_on(
        self, channel: grpc.aio.Channel, stream: FetchStream, request: pages_pb2.FetchRequest
    ) -> Fetched:
        answered = False
        try:
            response = await stream.ask(request)
            answered = True
        finally:
            if answered and len(self._idle) < _STREAMS_KEPT:
                self._idle.append((channel, stream))
            else:
                stream.close()
        return response

    def _away(self, why: str) -> HostAwayError:
        self._avoided_until = time.monotonic() + self._rest
        self._rest = min(2 * self._rest, _REST_MAX_SECONDS)
        log.info("a host is away", host=self.name, address=self.address, why=why)
        return HostAwayError(why)


class Hosts:
    """The hosts of the cluster, by the index.

    Args:
        own: this host's name, which is never among the others.
        index: the index's gRPC target. Empty: there are no others.
        tls: None: without.
    """

    def __init__(self, own: str, index: str, tls: Tls | None = None) -> None:
        self.own = own
        self._index = index
        self._tls = tls
        self._index_channels = Channels(Role.INDEX, tls, (("grpc.max_receive_message_length", -1),))
        self._channels = Channels(Role.MERGER, tls, _OPTIONS)
        self._hosts: dict[str, Host] = {}
        self._live: frozenset[str] = frozenset()
        self._asked_at = float("-inf")

    def all(self) -> list[Host]:
        """Return every host that was ever heard of."""
        return list(self._hosts.values())

    async def find(self, name: str) -> Host | None:
        """Return a host by its name, if it has a lease; one that just came, too.

        Raises:
            HostAwayError: the index does not answer.
        """
        known = (await self.live()).get(name)
        return known or (await self._ask_index()).get(name)

    async def live(self) -> dict[str, Host]:
        """Return all other hosts that hold a lease, as the index said a moment ago.

        Raises:
            HostAwayError: the index does not answer.
        """
        if not self._index:
            raise HostAwayError("this merger has no index: set its `index`")
        if time.monotonic() >= self._asked_at + _TABLE_SECONDS:
            return await self._ask_index()
        return {name: self._hosts[name] for name in self._live}

    def known(self, names: Iterable[str]) -> list[Host]:
        """Return those of the hosts that were ever heard of."""
        return [self._hosts[name] for name in names if name in self._hosts]

    async def holders(self, domain_id: bytes, fingerprints: Fingerprints) -> dict[Host, Mask]:
        """Return which other host has which fingerprints, by the index: a hint.

        Raises:
            HostAwayError: the index does not answer.
        """
        held: dict[Host, Mask] = {}
        if not self._index:
            return held
        stub = index_pb2_grpc.IndexStub(self._index_channels.get(self._index))
        for low in range(0, len(fingerprints), LOOKUP_MAX):
            packed = fingerprints[low : low + LOOKUP_MAX].tobytes()
            request = index_pb2.LookupRequest(domain_id=domain_id, fingerprints=packed)
            try:
                answer = await stub.Lookup(request, timeout=_INDEX_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise HostAwayError(f"the index is away: {error.details()}") from error
            pairs = np.frombuffer(answer.holders, "<u4").reshape(-1, 2)
            self._learn(answer.hosts)
            for number, each in enumerate(answer.hosts):
                host = self._hosts.get(each.name)
                mine = pairs[pairs[:, 1] == number, 0]
                if host is not None and mine.size:
                    mask = held.setdefault(host, np.zeros(len(fingerprints), np.bool_))
                    mask[mine + low] = True
        return held

    async def close(self) -> None:
        """Let go of all connections."""
        for host in self._hosts.values():
            host.close()
        await self._channels.close()
        await self._index_channels.close()

    async def _ask_index(self) -> dict[str, Host]:
        stub = index_pb2_grpc.IndexStub(self._index_channels.get(self._index))
        try:
            answer = await stub.ListHosts(index_pb2.ListHostsRequest(), timeout=_INDEX_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise HostAwayError(f"the index is away: {error.details()}") from error
        self._live = frozenset(host.name for host in self._learn(answer.hosts))
        self._asked_at = time.monotonic()
        return {name: self._hosts[name] for name in self._live}

    def _learn(self, seen: Iterable[index_pb2.Host]) -> list[Host]:
        """Note where hosts are; return those that other hosts can reach."""
        learnt = []
        for each in seen:
            if each.name == self.own or not each.merger_address:
                continue
            host = self._hosts.get(each.name)
            if host is None:
                host = Host(each.name, each.merger_address, self._channels, self._tls)
                self._hosts[each.name] = host
            elif host.address != each.merger_address:
                host.close()
                host.address = each.merger_address
            learnt.append(host)
        return learnt
