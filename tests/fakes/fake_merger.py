"""A merger that speaks merger.proto, and merges the arrays of fake agents."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from fakes.fake_agent import FakeAgent, FakeArena

from samepage.daemon.wire import Outcome
from samepage.v1 import merger_pb2, merger_pb2_grpc
from samepage_scanner.match import NO_LEADER, RUN

Context = grpc.aio.ServicerContext[Any, Any]
Run = tuple[str, int, str, int, int]


class FakeMerger(merger_pb2_grpc.MergerServicer):
    """Compares pages as an agent would, and marks equal ones shared.

    Attributes:
        agents: whose arenas it knows.
        runs: every run it was asked for: leader's arena and page ("zero", 0 for none), follower's
            arena and page, count.
        requested: set by every request.
        evicted: arena, first page and count of every run that was to be evicted.
        refused: the name of an arena whose runs make a request INVALID_ARGUMENT.
        hold: when set, a request waits for it after its first page.
    """

    def __init__(self, directory: Path, agents: Iterable[FakeAgent] = ()) -> None:
        self.agents = list(agents)
        self.runs: list[Run] = []
        self.domains: list[str] = []
        self.evicted: list[tuple[str, int, int]] = []
        self.requested = asyncio.Event()
        self.hold: asyncio.Event | None = None
        self.refused = ""
        self._path = directory / "merger-api.sock"
        self._server = grpc.aio.server()

    async def start(self) -> None:
        """Serve on the directory's merger-api.sock."""
        self._path.unlink(missing_ok=True)
        merger_pb2_grpc.add_MergerServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self._path}")
        await self._server.start()

    async def stop(self) -> None:
        """End at once, requests in flight included."""
        await self._server.stop(None)

    async def Evict(
        self, request: merger_pb2.EvictRequest, context: Context
    ) -> AsyncIterator[merger_pb2.EvictResponse]:
        """Note what should leave; it all does."""
        pages = 0
        for number, page, count in struct.iter_unpack("<IQQ", request.runs):
            key = request.arenas[number]
            [name] = [
                arena.name
                for agent in self.agents
                for arena in agent.arenas.values()
                if (agent.agent, arena.number) == (key.agent, key.arena)
            ]
            self.evicted.append((name, page, count))
            pages += count
        yield merger_pb2.EvictResponse(spilled=pages)
        yield merger_pb2.EvictResponse(done=True)

    async def EvictArena(
        self, request: merger_pb2.EvictArenaRequest, context: Context
    ) -> AsyncIterator[merger_pb2.EvictResponse]:
        """Not for the scanner: does nothing."""
        yield merger_pb2.EvictResponse(done=True)

    async def Merge(
        self, request: merger_pb2.MergeRequest, context: Context
    ) -> AsyncIterator[merger_pb2.MergeResponse]:
        """Carry out every run, page by page."""
        self.requested.set()
        self.domains.append(request.domain)
        arenas = [self._find(key) for key in request.arenas]
        if self.refused:
            await self._check(request, arenas, context)
        tally = np.zeros((len(arenas), len(Outcome) + 1), np.int64)
        for leader, follower, leader_page, page, count in np.frombuffer(request.runs, RUN).tolist():
            follows = arenas[follower]
            leads = None if leader == NO_LEADER else arenas[leader]
            self._note(leads, leader_page, follows, page, count)
            for step in range(count):
                if leads is not None:
                    tally[leader] += _promote(leads, leader_page + step)
                tally[follower] += _follow(follows, page + step, leads, leader_page + step)
        if self.hold is not None:
            yield merger_pb2.MergeResponse(pages_done=1)
            await self.hold.wait()
        for number, columns in enumerate(tally.tolist()):
            names = [*(outcome.name.lower() for outcome in Outcome), "gone"]
            outcome = merger_pb2.ArenaOutcome(
                arena=number, **dict(zip(names, columns, strict=True))
            )
            yield merger_pb2.MergeResponse(outcomes=[outcome])
        yield merger_pb2.MergeResponse(done=True)

    async def ListArenas(
        self, request: merger_pb2.ListArenasRequest, context: Context
    ) -> merger_pb2.ListArenasResponse:
        """UNIMPLEMENTED: a scanner does not ask."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this merger")

    async def GetAccounts(
        self, request: merger_pb2.GetAccountsRequest, context: Context
    ) -> AsyncIterator[merger_pb2.GetAccountsResponse]:
        """Nothing: a scanner does not ask."""
        yield merger_pb2.GetAccountsResponse()

    async def Unshare(
        self, request: merger_pb2.UnshareRequest, context: Context
    ) -> merger_pb2.UnshareResponse:
        """UNIMPLEMENTED: a scanner does not ask."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this merger")

    async def ForgetHost(
        self, request: merger_pb2.ForgetHostRequest, context: Context
    ) -> merger_pb2.ForgetHostResponse:
        """UNIMPLEMENTED: a scanner does not ask."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this merger")

    async def GetMergerStatus(
        self, request: merger_pb2.GetMergerStatusRequest, context: Context
    ) -> merger_pb2.GetMergerStatusResponse:
        """UNIMPLEMENTED: a scanner does not ask."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not in this merger")

    async def GetPolicy(
        self, request: merger_pb2.GetMergerPolicyRequest, context: Context
    ) -> merger_pb2.GetMergerPolicyResponse:
        """None."""
        return merger_pb2.GetMergerPolicyResponse()

    async def SetPolicy(
        self, request: merger_pb2.SetMergerPolicyRequest, context: Context
    ) -> merger_pb2.SetMergerPolicyResponse:
        """None."""
        return merger_pb2.SetMergerPolicyResponse()

    async def _check(
        self,
        request: merger_pb2.MergeRequest,
        arenas: Sequence[FakeArena | None],
        context: Context,
    ) -> None:
        for leader, follower, *_ in np.frombuffer(request.runs, RUN).tolist():
            sides = [arenas[number] for number in (leader, follower) if number != NO_LEADER]
            names = [arena.name for arena in sides if arena is not None]
            if self.refused in names:
                text = f"a run is outside arena {self.refused}"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)

    def _find(self, key: merger_pb2.ArenaKey) -> FakeArena | None:
        for agent in self.agents:
            if agent.agent == key.agent:
                return agent.arenas.get(key.arena)
        return None

    def _note(
        self,
        leads: FakeArena | None,
        leader_page: int,
        follows: FakeArena | None,
        page: int,
        n: int,
    ) -> None:
        leader = leads.name if leads is not None else "zero"
        follower = follows.name if follows is not None else "gone"
        self.runs.append((leader, leader_page, follower, page, n))


def _columns(column: int, count: int = 1) -> Any:
    row = np.zeros(len(Outcome) + 1, np.int64)
    row[column] = count
    return row


def _promote(leads: FakeArena, page: int) -> Any:
    merged = 0 if leads.shared[page] else 1
    leads.shared[page] = True
    return _columns(Outcome.MERGED, merged)


def _follow(follows: FakeArena | None, page: int, leads: FakeArena | None, leader: int) -> Any:
    if follows is None:
        return _columns(len(Outcome))
    if follows.pinned[page]:
        return _columns(Outcome.PINNED)
    if leads is None:
        equal = not follows.memory[page].any()
        follows.absent[page] = equal
    else:
        equal = np.array_equal(follows.memory[page], leads.memory[leader])
        follows.shared[page] = equal
    return _columns(Outcome.MERGED if equal else Outcome.DIFFERS)
