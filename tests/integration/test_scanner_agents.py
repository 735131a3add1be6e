"""Agents that misbehave, stall or die hurt nobody but themselves."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import AsyncIterator, Callable

import pytest
import structlog
from fakes.fake_agent import DroppedError, FakeAgent, FakeArena, RefusedError, random_pages
from fakes.fake_merger import FakeMerger
from helpers.scanner_host import ScannerHost

from samepage.daemon import wire
from samepage.daemon.wire import Message, PageState, Type
from samepage_scanner.channel import SHARES_MAX

ANSWER_SECONDS = 0.3

Misbehave = Callable[[FakeAgent, Message], None]


@pytest.fixture
async def host() -> AsyncIterator[ScannerHost]:
    async with ScannerHost(answer_seconds=ANSWER_SECONDS, pages_max=1000) as host:
        yield host


@pytest.fixture
async def good(host: ScannerHost) -> AsyncIterator[FakeAgent]:
    agent = await FakeAgent.connect(host.directory)
    yield agent
    agent.close()


@pytest.fixture
async def bad(host: ScannerHost) -> AsyncIterator[FakeAgent]:
    agent = await FakeAgent.connect(host.directory)
    yield agent
    if not agent.hung_up.is_set():
        agent.close()


@pytest.fixture
async def merger(host: ScannerHost, good: FakeAgent, bad: FakeAgent) -> AsyncIterator[FakeMerger]:
    merger = FakeMerger(host.directory, [good, bad])
    await merger.start()
    yield merger
    await merger.stop()


async def open_twins(agent: FakeAgent) -> FakeArena:
    """Two arenas with 8 pages each, all equal; the first one."""
    arenas = [await agent.open(name, random_pages(8, 1)) for name in ("good-a", "good-b")]
    return arenas[0]


@pytest.mark.parametrize(
    ("name", "domain", "pages"),
    [
        ("", "default", 8),
        ("a/b", "default", 8),
        ("a\nb", "default", 8),
        ("a" * 128, "default", 8),
        ("a", "Default", 8),
        ("a", "-default", 8),
        ("a", "d" * 64, 8),
        ("a", "default", 0),
        ("a", "default", (1 << 36) + 1),
        ("a", "default", (1 << 64) - 1),
    ],
)
async def test_bad_names_and_sizes_are_refused(
    host: ScannerHost, bad: FakeAgent, name: str, domain: str, pages: int
) -> None:
    arena = await bad.open("template", random_pages(1, 1))
    arena.name, arena.domain, arena.number = name, domain, 2
    with pytest.raises(RefusedError) as refused:
        await bad.announce(arena, pages)
    assert refused.value.error == errno.EINVAL
    assert refused.value.text
    assert [open.name for open in host.service.books.arenas()] == ["template"]
    # Who shares it all the same is told the reason once more, and not dropped.
    with pytest.raises(RefusedError) as again:
        await bad.share(arena)
    assert again.value.text == refused.value.text
    bad.arenas[arena.number] = arena
    bad.close_arena(arena)
    await bad.open("good", random_pages(1, 1))


async def test_who_leaves_the_domain_out_is_told_it(host: ScannerHost, bad: FakeAgent) -> None:
    arena = await bad.open("a", random_pages(1, 1), "")
    assert arena.domain == "default"


async def test_version_2_has_no_arenas_without_a_domain(host: ScannerHost) -> None:
    agent = await FakeAgent.connect(host.directory, version=2)
    with pytest.raises(RefusedError) as refused:
        await agent.open("a", random_pages(1, 1), "")
    assert refused.value.error == errno.EINVAL
    agent.close()


@pytest.mark.parametrize("pages", [1000, 1 << 36])
async def test_books_that_are_full_refuse(bad: FakeAgent, pages: int) -> None:
    arena = await bad.open("a", random_pages(1, 1))
    arena.number = 2
    with pytest.raises(RefusedError, match="pages_max") as refused:
        await bad.announce(arena, pages)
    assert refused.value.error == errno.ENOMEM
    await bad.announce(arena, 999)


def _header(
    magic: int = wire.MAGIC,
    version: int = wire.VERSION,
    kind: int = Type.SHARE,
    length: int = 16,
    arena: int = 1,
    payload: bytes = b"",
) -> bytes:
    return struct.pack("<HBBIII", magic, version, kind, length, 1, arena) + payload


def _arena_open(name_bytes: int, text: bytes, arena: int = 2) -> bytes:
    payload = wire.ARENA_OPEN.pack(8, 0, 0, name_bytes, 7, 0, bytes(16)) + text
    return wire.pack(Type.ARENA_OPEN, 1, arena, payload)


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(wire.MESSAGE_MAX),
        _header(magic=0x1234),
        _header(length=15),
        _header(length=1 << 31),
        _header(kind=99),
        _header()[:15],
        _header(payload=b"\0", length=17),
        _header(arena=9),
        wire.pack(Type.HELLO, 1, 0, wire.HELLO.pack(b"0123456789abcdef", 1, 0)),
        wire.pack(Type.HELLO, 1, 0, b"short"),
        wire.pack(Type.DONE, 77, 1, wire.DONE.pack(0, 0)),
        wire.pack(Type.EXTENTS, 0, 1, bytes(24)),
        wire.pack(Type.RESTORED, 0, 1, bytes(16)),
        wire.pack(Type.ACCOUNT, 1, 1),
        wire.pack(Type.WELCOME, 1, 1, bytes(16)),
        wire.pack(Type.ARENA_CLOSE, 0, 2),
        wire.pack(Type.ARENA_CLOSE, 0, 1, b"\0"),
        _arena_open(1, b"adefault")[:30],
        _arena_open(2, b"adefault"),
        _arena_open(1, b"\xffdefault"),
        _arena_open(1, b"adefault", arena=1),
        _arena_open(1, b"adefault", arena=0),
    ],
)
async def test_garbage_ends_that_connection_alone(
    good: FakeAgent, bad: FakeAgent, merger: FakeMerger, packet: bytes
) -> None:
    arena = await open_twins(good)
    await bad.open("bad", random_pages(8, 1))
    bad.send(packet)
    await bad.hung_up.wait()
    assert (await good.share(arena))["shared"] == 8
    assert {run[0] for run in merger.runs} == {"good-a"}


@pytest.mark.parametrize("version", [1, 4])
async def test_wrong_version_is_told(host: ScannerHost, version: int) -> None:
    agent = await FakeAgent.connect(host.directory, hello=False)
    hello = _header(version=version, kind=Type.HELLO, length=40, payload=bytes(24))
    agent.send(hello)
    refused = await agent.notice
    assert refused.type is Type.REFUSED
    assert wire.REFUSED.unpack_from(refused.payload) == (errno.EPROTONOSUPPORT,)
    assert f"protocol version {version}, and this daemon speaks 2 to 3".encode() in refused.payload
    await agent.hung_up.wait()


async def test_a_message_of_another_version_than_hello_ends_the_connection(
    host: ScannerHost,
) -> None:
    agent = await FakeAgent.connect(host.directory, version=2)
    agent.send(_header(version=3, kind=Type.SHARE, length=16))
    await agent.hung_up.wait()


async def test_nothing_before_hello(host: ScannerHost) -> None:
    agent = await FakeAgent.connect(host.directory, hello=False)
    with pytest.raises(DroppedError):
        await agent.request(Type.SHARE, 1)


def outcomes_that_nobody_asked_for(agent: FakeAgent, order: Message) -> None:
    agent.done(order, outcomes=bytes(8))


def outcomes_out_of_range(agent: FakeAgent, order: Message) -> None:
    agent.done(order, outcomes=b"\xff")


def fewer_outcomes_than_it_says(agent: FakeAgent, order: Message) -> None:
    payload = wire.DONE.pack(0, 5) + bytes(3)
    agent.send(wire.pack(Type.DONE, order.seq, order.arena, payload))


def states_out_of_range(agent: FakeAgent, order: Message) -> None:
    agent.write_window(bytes(8 * 16) + bytes([max(PageState) + 1] * 8))
    agent.done(order)


def answer_twice(agent: FakeAgent, order: Message) -> None:
    agent.answer(order)
    agent.done(order)


def die(agent: FakeAgent, order: Message) -> None:
    agent.close()


@pytest.mark.parametrize(
    "misbehave",
    [
        outcomes_that_nobody_asked_for,
        outcomes_out_of_range,
        fewer_outcomes_than_it_says,
        states_out_of_range,
        answer_twice,
        die,
    ],
)
async def test_liars_and_the_dead_are_dropped_in_mid_pass(
    good: FakeAgent, bad: FakeAgent, merger: FakeMerger, misbehave: Misbehave
) -> None:
    arena = await open_twins(good)
    await bad.open("bad", random_pages(8, 1))
    bad.on_order = lambda order: misbehave(bad, order)
    assert (await good.share(arena))["shared"] == 8
    await bad.hung_up.wait()
    assert (await good.share(arena))["shared"] == 8


async def test_agent_that_refuses_an_order_is_left_out(
    good: FakeAgent, bad: FakeAgent, merger: FakeMerger
) -> None:
    arena = await open_twins(good)
    other = await bad.open("bad", random_pages(8, 1))
    bad.on_order = lambda order: bad.done(order, error=errno.ENOENT)
    assert (await good.share(arena))["shared"] == 8
    with pytest.raises(RefusedError, match="does not answer"):
        await bad.share(other)
    bad.on_order = None
    assert (await bad.share(other))["shared"] == 8


async def test_agent_that_never_answers_is_skipped_and_not_asked_again(
    good: FakeAgent, bad: FakeAgent, merger: FakeMerger
) -> None:
    arena = await open_twins(good)
    other = await bad.open("bad", random_pages(8, 1))
    owed: list[Message] = []
    bad.on_order = owed.append
    clock = asyncio.get_running_loop().time
    began = clock()
    assert (await good.share(arena))["shared"] == 8
    assert clock() - began >= ANSWER_SECONDS
    began = clock()
    for _ in range(5):
        await good.share(arena)
    assert clock() - began < ANSWER_SECONDS
    assert len(owed) == 1
    with pytest.raises(RefusedError, match="does not answer in time") as refused:
        await bad.share(other)
    assert refused.value.error == errno.ETIMEDOUT
    bad.on_order = None
    bad.answer(owed[0])
    assert (await bad.share(other))["shared"] == 8


async def test_slow_agent_has_a_set_time_for_a_whole_pass(
    host: ScannerHost, good: FakeAgent, bad: FakeAgent, merger: FakeMerger
) -> None:
    """It answers every order in time, but has many arenas."""
    arena = await open_twins(good)
    for number in range(50):
        await bad.open(f"slow-{number}", random_pages(1, 1))
    loop = asyncio.get_running_loop()
    bad.on_order = lambda order: loop.call_later(ANSWER_SECONDS / 4, bad.answer, order)
    began = loop.time()
    assert (await good.share(arena))["shared"] == 8
    assert loop.time() - began < 3 * ANSWER_SECONDS
    assert 2 <= len(bad.orders) <= 6


async def test_window_is_copied_before_it_is_believed(
    good: FakeAgent, bad: FakeAgent, merger: FakeMerger
) -> None:
    """What an agent writes to its window after its answer reaches nothing."""
    arena = await open_twins(good)
    other = await bad.open("bad", random_pages(8, 2))
    assert (await bad.share(other))["unique"] == 8
    bad.write_window(b"\xff" * 17 * 8)
    bad.on_order = lambda order: None
    assert (await good.share(arena))["shared"] == 8
    assert {run[2] for run in merger.runs} == {"good-b"}


async def test_too_many_shares_at_once(bad: FakeAgent, merger: FakeMerger) -> None:
    arena = await bad.open("bad", random_pages(8, 1))
    bad.on_order = lambda order: None
    shares = [bad.share(arena) for _ in range(SHARES_MAX + 10)]
    results = await asyncio.gather(*shares, return_exceptions=True)
    errors = [result.error for result in results if isinstance(result, RefusedError)]
    assert errors.count(errno.EAGAIN) == 10
    assert errors.count(errno.ETIMEDOUT) == SHARES_MAX


async def test_stopped_processes_hold_up_nobody() -> None:
    """More of them than may be asked at once, and far more time than a share may take."""
    async with ScannerHost(answer_seconds=3600.0) as host:
        stopped = [await FakeAgent.connect(host.directory) for _ in range(3)]
        for number, agent in enumerate(stopped):
            await agent.open(f"stopped-{number}", random_pages(8, 1))
            agent.on_order = lambda order: None
        good = await FakeAgent.connect(host.directory)
        merger = FakeMerger(host.directory, [good])
        await merger.start()
        arena = await open_twins(good)
        with structlog.testing.capture_logs() as logs:
            async with asyncio.timeout(60):
                assert (await good.share(arena))["shared"] == 8
                await host.service.passes.run_once()
        left_out = sorted(e["arenas"] for e in logs if e["event"] == "agent is left out")
        assert left_out == [["stopped-0"], ["stopped-1"], ["stopped-2"]]
        for agent in (*stopped, good):
            agent.close()
        await merger.stop()
