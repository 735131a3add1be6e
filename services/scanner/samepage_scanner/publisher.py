"""Tells the index what this host holds, and asks it what others hold.

One stream, one request in flight. What was collected but not acknowledged waits in `_pending`;
when the index still knows this scanner's epoch after a lost connection, those batches are sent
again (adding and removing twice is the same as once), else everything is collected anew. The
index may be away for as long as it likes: meanwhile nothing is collected, and the books remember
with a bit a page what it knew.

While another host is in the cluster under this one's name, the index refuses this one, which asks
again until that lease ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import grpc
import numpy as np
import structlog

from samepage.daemon import heap
from samepage.daemon.policies import Policies
from samepage.daemon.roles import Role
from samepage.daemon.tls import Tls, open_channel
from samepage.v1 import index_pb2, index_pb2_grpc
from samepage_scanner import deltas
from samepage_scanner import fingerprints as fp
from samepage_scanner.books import Arena, Books, Domain
from samepage_scanner.config import Config

BATCH_MAX = 1 << 14
LOOKUP_MAX = 1 << 14

# Longer than the index gives Redis, so that it is the index that says what is wrong.
_ANSWER_SECONDS = 15.0
_BACKOFF_SECONDS = 0.2
_BACKOFF_MAX_SECONDS = 30.0
_REFUSED_SECONDS = 5.0
_LEAVE_SECONDS = 1.0
_RENEWALS_A_LEASE = 4
_OPTIONS = (("grpc.max_receive_message_length", 64 << 20),)

Stream = grpc.aio.StreamStreamCall[index_pb2.PublishRequest, index_pb2.PublishResponse]

log = structlog.get_logger(__name__)


class IndexAwayError(Exception):
    """The index does not answer, or not as it should."""


class Publisher:
    """Streams to the index until cancelled; reconnects by itself.

    Args:
        target: the index's gRPC target.
        host: this host's name in the cluster.
        merger_address: where other hosts reach this one's merger.
        policies: say which fingerprints the index gets.
        changed: told whether the index is there, whenever that changes.
        tls: for the connections; None: without.

    Attributes:
        refusal: why the index refuses this host; empty when it does not.
    """

    def __init__(
        self,
        books: Books,
        target: str,
        host: str,
        merger_address: str,
        policies: Policies[Config],
        changed: Callable[[bool], None],
        tls: Tls | None,
    ) -> None:
        self._books = books
        self._tls = tls
        self._target = target
        self._policies = policies
        self._changed = changed
        policies.follow(self._policy_changed)
        self._announce = index_pb2.Announce(
            host=host, epoch=secrets.randbits(63) + 1, merger_address=merger_address
        )
        self._pending: deque[index_pb2.Batch] = deque()
        self._news = asyncio.Event()
        self._asked = asyncio.Event()
        self.connected = False
        self.refusal = ""
        self.connections = 0
        self.published = 0

    def notify(self) -> None:
        """A pass ended: there may be something to publish."""
        self._news.set()

    async def asked(self, seconds: float) -> None:
        """Return when the index has this host, or will not have it now, or after so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.wait()

    async def run_forever(self) -> None:
        """Sessions with the index, until cancelled."""
        backoff = _BACKOFF_SECONDS
        while True:
            try:
                await self._session()
            except (grpc.aio.AioRpcError, IndexAwayError, TimeoutError) as error:
                if self.connected:
                    backoff = _BACKOFF_SECONDS
                self._away(error)
                self._asked.set()
            finally:
                self._connected(False)
            longest = _REFUSED_SECONDS if self.refusal else _BACKOFF_MAX_SECONDS
            await asyncio.sleep(min(backoff, longest) * random.uniform(0.5, 1.0))
            backoff = min(2 * backoff, _BACKOFF_MAX_SECONDS)

    async def overlap(self, arenas: Iterable[Arena]) -> tuple[Counter[str], int]:
        """How many of the arenas' distinct pages each other host holds, and how many there are.

        With sampling, the first is what the sample says, for all.

        Raises:
            IndexAwayError: the index does not answer.
        """
        held: Counter[str] = Counter()
        distinct = 0
        bits = self._policies.current.sampling_bits
        by_domain: dict[str, list[Arena]] = {}
        for arena in arenas:
            by_domain.setdefault(arena.domain.name, []).append(arena)
        try:
            async with self._channel() as channel:
                stub = index_pb2_grpc.IndexStub(channel)
                for some in by_domain.values():
                    async for part in _distinct(some):
                        distinct += len(part)
                        sample = part[fp.sampled(part, bits)]
                        held += await self._lookup(stub, some[0].domain, sample)
        except grpc.aio.AioRpcError as error:
            raise IndexAwayError(_why(error)) from error
        return Counter({host: pages << bits for host, pages in held.items()}), distinct

    async def _lookup(
        self, stub: index_pb2_grpc.IndexAsyncStub, domain: Domain, part: fp.Fingerprints
    ) -> Counter[str]:
        held: Counter[str] = Counter()
        for first in range(0, len(part), LOOKUP_MAX):
            answer = await stub.Lookup(
                index_pb2.LookupRequest(
                    domain_id=domain.identity,
                    fingerprints=part[first : first + LOOKUP_MAX].tobytes(),
                ),
                timeout=_ANSWER_SECONDS,
            )
            numbers = np.frombuffer(answer.holders, "<u4").reshape(-1, 2)[:, 1]
            counts = np.bincount(numbers, minlength=len(answer.hosts))
            for host, count in zip(answer.hosts, counts, strict=True):
                if host.name != self._announce.host:
                    held[host.name] += int(count)
        return held

    def _channel(self) -> grpc.aio.Channel:
        return open_channel(self._target, Role.INDEX, self._tls, _OPTIONS)

    async def _session(self) -> None:
        """One connection, for as long as it holds."""
        async with self._channel() as channel:
            stream = index_pb2_grpc.IndexStub(channel).Publish()
            with contextlib.closing(_Cancelling(stream)):
                lease_seconds = await self._introduce(stream)
                self.refusal = ""
                self._connected(True)
                self._asked.set()
                try:
                    while True:
                        lease_seconds = await self._round(stream, lease_seconds)
                except asyncio.CancelledError:
                    await _take_leave(stream)
                    raise

    async def _introduce(self, stream: Stream) -> float:
        """Announce this host; returns the lease in seconds."""
        answer = await _ask(stream, index_pb2.PublishRequest(announce=self._announce))
        if answer.WhichOneof("kind") != "announced":
            raise IndexAwayError("it did not answer an Announce")
        if not answer.announced.resumed:
            await self._forget()
        # The index may lack what was never sent: look for it at once.
        self._news.set()
        return answer.announced.lease_ms / 1000

    async def _round(self, stream: Stream, lease_seconds: float) -> float:
        """Publish what is new, or keep the lease when nothing is."""
        if self._pending or await self._collect():
            while self._pending:
                await self._send(stream, self._pending[0])
                self._pending.popleft()
            heap.trim()
            return lease_seconds
        try:
            async with asyncio.timeout(lease_seconds / _RENEWALS_A_LEASE):
                await self._news.wait()
        except TimeoutError:
            answer = await _ask(stream, index_pb2.PublishRequest(renew=index_pb2.Renew()))
            if not answer.renewed.known:
                return await self._introduce(stream)
        return lease_seconds

    async def _send(self, stream: Stream, batch: index_pb2.Batch) -> None:
        answer = await _ask(stream, index_pb2.PublishRequest(batch=batch))
        if answer.WhichOneof("kind") != "accepted":
            raise IndexAwayError("it did not answer a Batch")
        self.published += (len(batch.added) - len(batch.removed)) // fp.FINGERPRINT_BYTES

    async def _collect(self) -> bool:
        """Fill `_pending` when there may be news; whether anything is there now."""
        if not self._news.is_set():
            return False
        self._news.clear()
        async with self._books.lock:
            self._books.bury()
            bits = self._policies.current.sampling_bits
            for domain in [known for known in self._books.domains.values() if known.untold]:
                for arena in domain.arenas:
                    arena.known_to_index = True
                delta = await asyncio.to_thread(deltas.collect, domain, bits=bits)
                self._pending.extend(_batches(domain, delta))
                if not delta.complete:
                    self._news.set()
        heap.trim()
        return bool(self._pending)

    async def _forget(self) -> None:
        """The index knows nothing of this host."""
        self._pending.clear()
        self.published = 0
        async with self._books.lock:
            for domain in self._books.domains.values():
                domain.buried.clear()
                deltas.forget(domain)

    def _policy_changed(self) -> None:
        for domain in self._books.domains.values():
            domain.untold = True
        self._news.set()

    def _away(self, error: Exception) -> None:
        """Tell why the index is away; of a refusal loudly, but once."""
        refused = (
            isinstance(error, grpc.aio.AioRpcError)
            and error.code() is grpc.StatusCode.ALREADY_EXISTS
        )
        if refused and not self.refusal:
            log.error(
                "the index refuses this host, which goes on alone",
                host=self._announce.host,
                why=_why(error),
            )
        elif not refused:
            log.info("index is away", target=self._target, why=_why(error))
        self.refusal = _why(error) if refused else ""

    def _connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            self.connections += connected
            self._changed(connected)


class _Cancelling:
    """Cancels a stream on close()."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def close(self) -> None:
        self._stream.cancel()


async def _take_leave(stream: Stream) -> None:
    """Tell the index that this scanner stops, if it can still be told: its lease ends anyway."""
    with contextlib.suppress(grpc.aio.AioRpcError, IndexAwayError, TimeoutError):
        async with asyncio.timeout(_LEAVE_SECONDS):
            await _ask(stream, index_pb2.PublishRequest(leave=index_pb2.Leave()))


async def _ask(stream: Stream, request: index_pb2.PublishRequest) -> index_pb2.PublishResponse:
    async with asyncio.timeout(_ANSWER_SECONDS):
        try:
            await stream.write(request)
        except asyncio.InvalidStateError as error:
            raise IndexAwayError(await stream.details()) from error
        answer = await stream.read()
    if not isinstance(answer, index_pb2.PublishResponse):
        raise IndexAwayError("it ended the stream")
    return answer


def _batches(domain: Domain, delta: deltas.Delta) -> list[index_pb2.Batch]:
    longest = max(len(delta.added), len(delta.removed))
    return [
        index_pb2.Batch(
            domain_id=domain.identity,
            added=delta.added[first : first + BATCH_MAX].tobytes(),
            removed=delta.removed[first : first + BATCH_MAX].tobytes(),
        )
        for first in range(0, longest, BATCH_MAX)
    ]


async def _distinct(arenas: Sequence[Arena]) -> AsyncIterator[fp.Fingerprints]:
    parts = deltas.distinct_parts([arena.pages for arena in arenas])
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part


def _why(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or "it does not answer in time"
