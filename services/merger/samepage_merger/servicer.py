"""The merger's gRPC API: converts, and delegates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import numpy as np

from samepage import accounts
from samepage.daemon.config import ConfigError
from samepage.daemon.policies import Policies
from samepage.daemon.wire import PAGE_SIZE
from samepage.errors import InvalidArgumentError, NotFoundError
from samepage.v1 import merger_pb2, merger_pb2_grpc
from samepage_merger.accounts import Accountant, Share, split
from samepage_merger.agents import Agents
from samepage_merger.cluster.elsewhere import Elsewhere
from samepage_merger.cluster.eviction import OUTCOME_NAMES as OUTCOMES_OF_EVICTION
from samepage_merger.cluster.eviction import Counts
from samepage_merger.cluster.handover import HandOvers
from samepage_merger.cluster.hosts import HostAwayError
from samepage_merger.config import Config
from samepage_merger.domains import Domains, RefusedError
from samepage_merger.headroom import Headroom
from samepage_merger.merging import MergeEngine, Progress
from samepage_merger.pairs import OUTCOME_NAMES
from samepage_merger.unsharing import Unsharer

Context = grpc.aio.ServicerContext[Any, Any]


class MergerServicer(merger_pb2_grpc.MergerServicer):
    """Serves samepage.v1.Merger."""

    def __init__(
        self,
        node: str,
        domains: Domains,
        agents: Agents,
        engine: MergeEngine,
        unsharer: Unsharer,
        accountant: Accountant,
        headroom: Headroom,
        policies: Policies[Config],
        elsewhere: Elsewhere,
        handovers: HandOvers,
    ) -> None:
        self._node = node
        self._domains = domains
        self._agents = agents
        self._engine = engine
        self._unsharer = unsharer
        self._accountant = accountant
        self._headroom = headroom
        self._policies = policies
        self._elsewhere = elsewhere
        self._handovers = handovers

    async def Merge(
        self, request: merger_pb2.MergeRequest, context: Context
    ) -> AsyncIterator[merger_pb2.MergeResponse]:
        """Make candidates one."""
        keys = [(key.agent, key.arena) for key in request.arenas]
        try:
            merging = self._engine.merge(request.domain, keys, request.runs)
            async with contextlib.aclosing(merging):
                async for progress in merging:
                    yield _response(progress)
        except InvalidArgumentError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        yield merger_pb2.MergeResponse(done=True)

    async def Evict(
        self, request: merger_pb2.EvictRequest, context: Context
    ) -> AsyncIterator[merger_pb2.EvictResponse]:
        """Let cold pages leave."""
        keys = [(key.agent, key.arena) for key in request.arenas]
        evicting = self._elsewhere.evictor.evict(request.domain, keys, request.runs)
        async for response in _evicted(evicting, context):
            yield response

    async def EvictArena(
        self, request: merger_pb2.EvictArenaRequest, context: Context
    ) -> AsyncIterator[merger_pb2.EvictResponse]:
        """Let all of an arena leave."""
        domain = request.domain or "default"
        evicting = self._elsewhere.evictor.evict_arena(domain, request.arena)
        async for response in _evicted(evicting, context):
            yield response

    async def ListArenas(
        self, request: merger_pb2.ListArenasRequest, context: Context
    ) -> merger_pb2.ListArenasResponse:
        """Every arena by domain and name."""
        arenas = [
            _arena(share)
            for domain in list(self._domains)
            for share in await split(domain)
            if domain.names.get(share.arena.name) is share.arena
        ]
        arenas.sort(key=lambda arena: (arena.domain, arena.name))
        return merger_pb2.ListArenasResponse(arenas=arenas)

    async def GetAccounts(
        self, request: merger_pb2.GetAccountsRequest, context: Context
    ) -> AsyncIterator[merger_pb2.GetAccountsResponse]:
        """Whose memory it is."""
        for response in accounts.pack(await self._accountant.host()):
            yield response

    async def Unshare(
        self, request: merger_pb2.UnshareRequest, context: Context
    ) -> merger_pb2.UnshareResponse:
        """Every page of an arena private again."""
        try:
            restored = await self._unsharer.unshare(request.domain or "default", request.arena)
        except InvalidArgumentError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except NotFoundError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except TimeoutError as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        return merger_pb2.UnshareResponse(restored=restored)

    async def ForgetHost(
        self, request: merger_pb2.ForgetHostRequest, context: Context
    ) -> merger_pb2.ForgetHostResponse:
        """Wait no longer for another host's answers."""
        try:
            arenas = await self._handovers.forget_host(request.host)
        except InvalidArgumentError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except HostAwayError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return merger_pb2.ForgetHostResponse(arenas=arenas)

    async def GetMergerStatus(
        self, request: merger_pb2.GetMergerStatusRequest, context: Context
    ) -> merger_pb2.GetMergerStatusResponse:
        """What the books say."""
        domains = list(self._domains)
        shared_pages = sum(domain.books.shared_pages() for domain in domains)
        slots = sum(domain.books.table.referenced() for domain in domains)
        return merger_pb2.GetMergerStatusResponse(
            node=self._node,
            agents=len(self._agents),
            older_agents=self._agents.older(),
            arenas=sum(1 for _ in self._domains.arenas()),
            shared_pages=shared_pages,
            slots=slots,
            store_bytes=self._domains.resident_bytes(),
            saved_bytes=(shared_pages - slots) * PAGE_SIZE,
            merged_total=sum(domain.merged for domain in domains),
            restored_total=sum(domain.restored for domain in domains),
            cpu_seconds=time.process_time(),
            headroom_bytes=self._headroom.left_bytes(),
            available_bytes=self._headroom.available_bytes(),
            no_headroom_total=self._headroom.refused,
            **self._elsewhere.status(),
        )

    async def GetPolicy(
        self, request: merger_pb2.GetMergerPolicyRequest, context: Context
    ) -> merger_pb2.GetMergerPolicyResponse:
        """What may change while the merger runs."""
        policy = self._policies.fill(merger_pb2.MergerPolicy())
        return merger_pb2.GetMergerPolicyResponse(policy=policy)

    async def SetPolicy(
        self, request: merger_pb2.SetMergerPolicyRequest, context: Context
    ) -> merger_pb2.SetMergerPolicyResponse:
        """Change it, and say what it is then."""
        try:
            self._policies.change(request.policy)
        except ConfigError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        policy = self._policies.fill(merger_pb2.MergerPolicy())
        return merger_pb2.SetMergerPolicyResponse(policy=policy)


async def _evicted(
    evicting: AsyncGenerator[Counts, None], context: Context
) -> AsyncIterator[merger_pb2.EvictResponse]:
    try:
        async with contextlib.aclosing(evicting):
            async for counts in evicting:
                if counts.any():
                    yield merger_pb2.EvictResponse(
                        **dict(zip(OUTCOMES_OF_EVICTION, counts.tolist(), strict=True))
                    )
    except InvalidArgumentError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except NotFoundError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except RefusedError as refused:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refused.args[1])
    yield merger_pb2.EvictResponse(done=True)


def _response(progress: Progress) -> merger_pb2.MergeResponse:
    rows = np.flatnonzero(progress.outcomes.sum(axis=1)).tolist()
    return merger_pb2.MergeResponse(
        outcomes=[
            merger_pb2.ArenaOutcome(
                arena=row, **dict(zip(OUTCOME_NAMES, progress.outcomes[row].tolist(), strict=True))
            )
            for row in rows
        ],
        pages_done=progress.pages_done,
    )


def _arena(share: Share) -> merger_pb2.Arena:
    arena = share.arena
    return merger_pb2.Arena(
        name=arena.name,
        domain=arena.domain.name,
        pid=share.pid,
        pages=arena.pages,
        shared_pages=share.shared,
        saved_bytes=share.saved_bytes,
    )
