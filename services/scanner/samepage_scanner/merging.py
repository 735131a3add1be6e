"""The scanner's client of its host's merger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import grpc
import numpy as np
import numpy.typing as npt
import structlog

from samepage.daemon.roles import Role
from samepage.daemon.tls import Channels, Tls
from samepage.daemon.wire import Outcome
from samepage.v1 import merger_pb2, merger_pb2_grpc
from samepage_scanner.books import Agent, Arena
from samepage_scanner.budget import Budget
from samepage_scanner.match import Runs

# A request's limits: what gRPC carries comfortably, and 1 GiB, so that a pass can be interrupted.
REQUEST_RUNS_MAX = 1 << 16
REQUEST_PAGES_MAX = 1 << 18
# 32 MiB, so that background merges can be paced.
BACKGROUND_PAGES_MAX = 1 << 13

# Columns of a Tally: the outcomes, and what the merger does not know.
GONE = len(Outcome)
NO_HEADROOM = GONE + 1
DISPLACED = NO_HEADROOM + 1

_RECONNECT_MS_MAX = 1000
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS_MAX),
)
# Long enough for one try to reconnect.
_READY_SECONDS = 2 * _RECONNECT_MS_MAX / 1000

_EVICT_RUN = np.dtype([("arena", "<u4"), ("page", "<u8"), ("count", "<u8")])

Tally = npt.NDArray[np.int64]

log = structlog.get_logger(__name__)


class MergerAwayError(Exception):
    """The merger does not answer; what it had done stays done. Its text says what to do."""


class MergerRefusedError(Exception):
    """The merger calls the request wrong; its text says why."""


def new_tally(arenas: int) -> Tally:
    """Pages by arena and outcome (the numbers of wire.Outcome, then those above), all 0."""
    return np.zeros((arenas, DISPLACED + 1), np.int64)


def requests(runs: Runs, pages_max: int = REQUEST_PAGES_MAX) -> Iterator[Runs]:
    """Split runs into pieces that make one request each."""
    first = 0
    while first < len(runs):
        piece = runs[first : first + REQUEST_RUNS_MAX]
        fitting = int(np.searchsorted(np.cumsum(piece["count"]), pages_max, "right"))
        yield piece[: max(fitting, 1)]
        first += max(fitting, 1)


def split_by_arenas(runs: Runs) -> list[Runs]:
    """The runs of each leader's and follower's arena by themselves."""
    runs = runs[np.lexsort((runs["follower_arena"], runs["leader_arena"]))]
    changes = runs["leader_arena"][1:] != runs["leader_arena"][:-1]
    changes |= runs["follower_arena"][1:] != runs["follower_arena"][:-1]
    return np.split(runs, np.flatnonzero(changes) + 1)


class MergerClient:
    """Talks to the merger; reconnects by itself.

    Args:
        target: gRPC target.
        progress_seconds: how long the merger may be silent during a request.
        changed: told whether the merger is there, whenever that changes.
        tls: for a merger that is not at a unix socket; None: without.
    """

    def __init__(
        self,
        target: str,
        progress_seconds: float,
        changed: Callable[[bool], None],
        tls: Tls | None = None,
    ) -> None:
        self._target = target
        self._progress_seconds = progress_seconds
        self._changed = changed
        self._channels = Channels(Role.MERGER, tls, _OPTIONS)
        self.connected = False
        self.connections = 0

    async def watch(self) -> None:
        """Keep connected, and keep `connected` true to the facts, until cancelled."""
        while True:
            channel = self._channel
            state = channel.get_state(try_to_connect=True)
            connected = state is grpc.ChannelConnectivity.READY
            if connected != self.connected:
                self.connected = connected
                self.connections += connected
                self._changed(connected)
            # A channel that fails stays in that state until it is connected; meanwhile its
            # certificates may have become old.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if connected else _READY_SECONDS):
                    await channel.wait_for_state_change(state)

    async def close(self) -> None:
        """Let go of the connection."""
        await self._channels.close()

    @property
    def _channel(self) -> grpc.aio.Channel:
        return self._channels.get(self._target)

    @property
    def _stub(self) -> merger_pb2_grpc.MergerAsyncStub:
        return merger_pb2_grpc.MergerStub(self._channel)

    async def ready(self) -> None:
        """Wait for a connection, but not for long.

        Raises:
            MergerAwayError: there is none.
        """
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._channel.channel_ready()
        except TimeoutError as error:
            raise self._away("does not answer") from error

    async def merge(self, domain: str, arenas: Sequence[Arena], runs: Runs, tally: Tally) -> None:
        """Have runs made one, and add their outcomes to the tally as they come.

        Raises:
            MergerAwayError: the merger went, or shows no progress.
            MergerRefusedError: it does not take the runs.
        """
        request = merger_pb2.MergeRequest(
            domain=domain,
            arenas=map(_key, arenas),
            runs=runs.tobytes(),
        )
        call = self._stub.Merge(request)
        try:
            await self._follow(call, tally)
        except TimeoutError as error:
            raise self._away(f"shows no progress for {self._progress_seconds:g} s") from error
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise MergerRefusedError(error.details() or "bad request") from error
            away = error.code() is grpc.StatusCode.UNAVAILABLE
            raise self._away("is away" if away else f"failed: {error.details()}") from error
        finally:
            call.cancel()

    async def evict(self, arena: Arena, ranges: npt.NDArray[np.int64]) -> int:
        """Have runs of pages (rows of first and count) leave the host; return how many did.

        Raises:
            MergerAwayError: the merger went, shows no progress, or evicts nothing.
        """
        runs = np.zeros(len(ranges), _EVICT_RUN)
        runs["page"], runs["count"] = ranges[:, 0], ranges[:, 1]
        request = merger_pb2.EvictRequest(
            domain=arena.domain.name, arenas=[_key(arena)], runs=runs.tobytes()
        )
        gone = 0
        try:
            async for answer in self._stub.Evict(request, timeout=self._progress_seconds):
                gone += answer.held_elsewhere + answer.spilled
        except grpc.aio.AioRpcError as error:
            raise self._away(f"evicts nothing: {error.details()}") from error
        return gone

    @contextlib.asynccontextmanager
    async def charged(self, budget: Budget, agents: set[Agent]) -> AsyncIterator[None]:
        """Charge a budget for what the merger, and these agents, spend while the context lasts."""
        before = await self.cpu_seconds()
        with budget.watch(agents):
            yield
        budget.charge(max(await self.cpu_seconds() - before, 0.0))

    async def cpu_seconds(self) -> float:
        """What the merger's process has spent since its start; 0 when it does not say."""
        request = merger_pb2.GetMergerStatusRequest()
        try:
            answer = await self._stub.GetMergerStatus(request, timeout=self._progress_seconds)
        except grpc.aio.AioRpcError:
            return 0.0
        return answer.cpu_seconds

    async def _follow(
        self,
        call: grpc.aio.UnaryStreamCall[merger_pb2.MergeRequest, merger_pb2.MergeResponse],
        tally: Tally,
    ) -> None:
        done = False
        while True:
            async with asyncio.timeout(self._progress_seconds):
                response = await call.read()
            if not isinstance(response, merger_pb2.MergeResponse):
                break
            for outcome in response.outcomes:
                if outcome.arena >= len(tally):
                    raise self._away(f"speaks of arena {outcome.arena}, which it was not asked of")
                tally[outcome.arena] += _columns(outcome)
            done = response.done
        if not done:
            raise self._away("ended a request without finishing it")

    def _away(self, what: str) -> MergerAwayError:
        return MergerAwayError(
            f"the merger at {self._target} {what}; memory is safe, "
            "start the merger or look at its log, then try again"
        )


def _columns(outcome: merger_pb2.ArenaOutcome) -> tuple[int, ...]:
    return (
        outcome.merged,
        outcome.differs,
        outcome.pinned,
        outcome.absent,
        outcome.busy,
        outcome.no_mapping,
        outcome.unsupported,
        outcome.gone,
        outcome.no_headroom,
        outcome.displaced,
    )


def _key(arena: Arena) -> merger_pb2.ArenaKey:
    return merger_pb2.ArenaKey(agent=arena.agent.peer.agent, arena=arena.number)
