"""Held arenas without a host: limits while arenas are made, callers that go away, late shares."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import grpc
import pytest

from samepage import errors
from samepage.client import Node
from samepage.reports import PAGE_SIZE, ShareReport
from samepage_merger.holding.errors import LimitError
from samepage_merger.holding.held import HeldArenas, Limits
from samepage_merger.holding.servicer import STATUS


class FakeArena:
    """An arena of plain bytes, whose calls wait until the node is told to go on."""

    sealed = False

    def __init__(self, node: FakeNode, name: str, size: int, domain: str) -> None:
        self.name, self.domain, self.size = name, domain, size
        self._node = node

    def close(self) -> None:
        self._node.wait()

    def share(self, timeout: float) -> ShareReport:
        self._node.wait()
        raise errors.ShareTimeoutError("late")


class FakeNode:
    """Makes arenas; each call waits for `go_on`, and `began` says that it waits."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.began = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.closed = False

    def wait(self) -> None:
        self.began.release()
        assert self.go_on.wait(20)

    def create_arena(self, name: str, size: int, domain: str) -> FakeArena:
        self.wait()
        if self.failure is not None:
            raise self.failure
        return FakeArena(self, name, size, domain)

    def close(self) -> None:
        self.closed = True


def held(node: FakeNode, **limits: int) -> HeldArenas:
    values: dict[str, Any] = {"held_bytes": 10 * PAGE_SIZE, "arenas": 3, "streams": 2, **limits}
    return HeldArenas(cast(Node, node), Limits(**values))


async def begun(node: FakeNode) -> None:
    """Wait until a call waits in its thread."""
    assert await asyncio.to_thread(node.began.acquire, True, 20)


async def test_what_is_being_made_counts() -> None:
    node = FakeNode()
    arenas = held(node)
    making = asyncio.create_task(arenas.create("", "a", 8 * PAGE_SIZE))
    await begun(node)
    with pytest.raises(errors.NameTakenError):
        await arenas.create("default", "a", 1)
    with pytest.raises(LimitError, match=r"8\.0 KiB left"):
        await arenas.create("", "b", 2 * PAGE_SIZE + 1)
    with pytest.raises(errors.NotFoundError):
        arenas.find("", "a")
    node.go_on.set()
    assert await making is arenas.find("default", "a")
    await arenas.close()
    assert node.closed


async def test_what_could_not_be_made_counts_no_more() -> None:
    node = FakeNode()
    node.go_on.set()
    arenas = held(node)
    node.failure = errors.OutOfMemoryError("no")
    for _ in range(5):
        with pytest.raises(errors.OutOfMemoryError):
            await arenas.create("", "a", 10 * PAGE_SIZE)
    assert arenas.held_bytes == 0
    node.failure = None
    await arenas.create("", "a", 10 * PAGE_SIZE)
    await arenas.close()


async def test_a_caller_that_goes_away_leaves_no_loose_end() -> None:
    """An arena that was asked for is made, and one that was to be deleted is gone."""
    node = FakeNode()
    arenas = held(node)
    making = asyncio.create_task(arenas.create("", "a", 1))
    await begun(node)
    making.cancel()
    await asyncio.wait({making})
    assert making.cancelled() and arenas.held_bytes == PAGE_SIZE
    node.go_on.set()
    while not arenas.arenas():
        await asyncio.sleep(0)
    arena = arenas.find("", "a")
    node.go_on.clear()
    node.began = threading.Semaphore(0)
    deleting = asyncio.create_task(arenas.delete(arena))
    await begun(node)
    deleting.cancel()
    await asyncio.wait({deleting})
    assert arenas.arenas() == [arena]
    node.go_on.set()
    while arenas.arenas():
        await asyncio.sleep(0)
    assert arenas.held_bytes == 0
    await arenas.close()


async def test_deleted_twice_at_once() -> None:
    node = FakeNode()
    node.go_on.set()
    arenas = held(node)
    arena = await arenas.create("", "a", 1)
    await asyncio.gather(arenas.delete(arena), arenas.delete(arena))
    other = await arenas.create("", "a", 1)
    await arenas.delete(arena)
    assert arenas.arenas() == [other] and arenas.held_bytes == PAGE_SIZE
    await arenas.close()


async def test_a_share_that_never_gets_its_turn_is_late() -> None:
    node = FakeNode()
    node.go_on.set()
    arenas = held(node)
    arena = await arenas.create("", "a", 1)
    node.go_on.clear()
    node.began = threading.Semaphore(0)
    sharing = [asyncio.create_task(arenas.share(arena, 600.0)) for _ in range(16)]
    for _ in sharing:
        await begun(node)
    with pytest.raises(errors.ShareTimeoutError):
        await arenas.share(arena, 0.01)
    # calls of other kinds have threads of their own
    making = asyncio.create_task(arenas.create("", "b", 1))
    await begun(node)
    node.go_on.set()
    await making
    for result in await asyncio.gather(*sharing, return_exceptions=True):
        assert isinstance(result, errors.ShareTimeoutError)
    await arenas.close()


def test_streams_are_counted() -> None:
    arenas = held(FakeNode(), streams=1)
    with arenas.stream():
        with pytest.raises(LimitError, match="1 streams"), arenas.stream():
            pass
        assert arenas.streams == 1
    assert arenas.streams == 0
    with arenas.stream():
        pass


def test_every_error_has_its_status() -> None:
    """One that is no bug of the helper's is never INTERNAL."""

    def status(kind: type[BaseException]) -> grpc.StatusCode:
        return next(code for known, code in STATUS if issubclass(kind, known))

    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.SamepageError)
    }
    internal = {kind for kind in kinds if status(kind) is grpc.StatusCode.INTERNAL}
    assert internal == {errors.SamepageError, errors.ForkedError}
    assert status(errors.ClosedError) is grpc.StatusCode.NOT_FOUND
    assert status(errors.ShareTimeoutError) is grpc.StatusCode.DEADLINE_EXCEEDED
