"""Arenas over gRPC: real helpers, a real host, and what the kernel says of both."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from application import PAGE, Application, content
from fakes.lone_merger import LoneMerger
from helpers.arenas_process import (
    CHUNK,
    ArenasProcess,
    Client,
    arenas_process,
    chunk,
    connected,
    target,
)
from helpers.up import Up, running, samepage

from samepage.v1 import arenas_pb2 as pb

pytestmark = pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap")

MIB = 2**20
SHARED = 5
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster")) as up:
        yield up


@pytest.fixture
async def client(up: Up) -> AsyncIterator[Client]:
    """A client of the host's own helper, which holds nothing afterwards."""
    async with connected(up.cluster.hosts[0].arenas) as client:
        yield client
        for arena in (await client.stub.ListHeldArenas(pb.ListHeldArenasRequest())).arenas:
            await client.delete(arena.arena, arena.domain)


@contextlib.asynccontextmanager
async def limited(up: Up, folder: Path, **settings: object) -> AsyncIterator[Client]:
    """A client of a helper with settings of its own."""
    with arenas_process(up.host(), folder, **settings) as helper:
        async with connected(await asyncio.to_thread(helper.address)) as client:
            yield client


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, text: str = "") -> AsyncIterator[dict[str, Any]]:
    """See that the call inside fails so; gives its trailing metadata."""
    trailer: dict[str, Any] = {}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield trailer
    details = caught.value.details() or ""
    assert caught.value.code() is code and text in details, details
    trailer.update(caught.value.trailing_metadata() or ())


async def rest(reading: grpc.aio.UnaryStreamCall[pb.ReadArenaRequest, Any]) -> None:
    """Take all that still comes; raises what the stream ends with."""
    while await reading.read() is not grpc.aio.EOF:
        pass


async def eventually(look: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await look():
            await asyncio.sleep(0.01)


async def test_what_is_written_is_read(client: Client) -> None:
    data = content(1, 64 * MIB // PAGE)
    made = await client.create("big", len(data))
    assert (made.domain, made.arena, made.size) == ("default", "big", len(data))
    assert await client.write("big", data) == len(data)
    assert await client.read("big") == data
    start, length = 5 * MIB - 3, 2 * MIB + 7
    assert await client.read("big", start, length) == data[start : start + length]
    stats = await client.stat("big")
    assert (stats.pages, stats.private_pages) == (len(data) // PAGE, len(data) // PAGE)
    assert stats.arena == made


async def test_what_was_never_written_is_zero_and_takes_no_memory(client: Client) -> None:
    assert (await client.create("a", 3 * PAGE - 1)).size == 3 * PAGE
    assert await client.write("a", b"xy", PAGE - 1) == 2
    stats = await client.stat("a")
    assert (stats.private_pages, stats.absent_pages, stats.shared_pages) == (2, 1, 0)
    assert await client.read("a") == bytes(PAGE - 1) + b"xy" + bytes(2 * PAGE - 1)


async def test_chunks_in_any_order(client: Client) -> None:
    await client.create("a", PAGE)
    requests = [target("a"), chunk(4, b"beef"), chunk(0, b"dead"), chunk(4096, b""), chunk(2, b"!")]
    answer = await client.stub.WriteArena(iter(requests))
    assert answer.written_bytes == 9
    assert (await client.read("a", 0, 8)) == b"de!dbeef"
    assert await client.read("a", PAGE) == b""
    assert await client.write("a", b"") == 0


async def test_domains_have_names_of_their_own(client: Client) -> None:
    for domain in ("", "red", "blue"):
        await client.create("same", PAGE, domain)
        await client.write("same", domain.encode(), domain=domain)
    assert await client.read("same", 0, 4, "blue") == b"blue"
    assert await client.read("same", 0, 4, "red") == b"red\0"
    assert await client.names("red") == ["same"] and len(await client.names()) == 3
    await client.delete("same", "red")
    assert await client.names("red") == []
    assert await client.read("same", 0, 1, "blue") == b"b"


async def test_sharing_with_each_other_and_with_an_application(up: Up, client: Client) -> None:
    """Three arenas of two processes become one; the kernel counts the memory as saved."""
    pages = 8192
    data = content(2, pages)
    helper = up.daemons()["host-1/arenas"]
    async with connected(up.cluster.hosts[0].arenas) as other:
        with Application(up.host()) as application:
            application.call("create", "c", pages)
            application.call("fill", "c", 2)
            for one, name in ((client, "a"), (other, "b")):
                await one.create(name, len(data))
                await one.write(name, data)
            before = pss(helper) + pss(application.pid)
            outcome = await client.share("a")
            assert outcome.shared == outcome.pages == pages
            saved = before - pss(helper) - pss(application.pid)
            assert saved > 2 * len(data) * 0.95
            assert application.call("pagemap", "c") == [SHARED] * pages
            assert (await other.stat("b")).shared_pages == pages
            assert (await other.stat("b")).saved_bytes == pytest.approx(len(data) * 2 / 3, abs=PAGE)
            # a write is its writer's alone
            await client.write("a", b"mine", 5 * PAGE)
            assert await other.read("b") == data
            assert application.call("digest", "c") == hashlib.sha256(data).hexdigest()
            changed = data[: 5 * PAGE] + b"mine" + data[5 * PAGE + 4 :]
            assert await client.read("a") == changed
            await client.stub.UnshareArena(pb.UnshareArenaRequest(arena="a"))
            assert (await client.stat("a")).private_pages == pages
            assert await client.read("a") == changed


def pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


async def test_a_deleted_arena_gives_back_memory_and_name(up: Up, client: Client) -> None:
    helper = up.daemons()["host-1/arenas"]
    assert resident(helper, 256 * MIB) == 0
    await client.create("a", 256 * MIB)
    await client.write("a", os.urandom(64 * MIB))
    assert resident(helper, 256 * MIB) >= 64 * MIB
    await client.delete("a")
    assert resident(helper, 256 * MIB) == 0
    async with refused(Code.NOT_FOUND, "no arena 'a'"):
        await client.read("a")
    await client.create("a", PAGE)
    assert await client.read("a") == bytes(PAGE)


def resident(pid: int, size: int) -> int:
    """Bytes in memory of a process's mappings of at least `size` bytes: larger than its heap's."""
    sizes, resident = (
        [
            int(line.split()[1]) * 1024
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()
            if line.startswith(field)
        ]
        for field in ("Size:", "Rss:")
    )
    return sum(rss for whole, rss in zip(sizes, resident, strict=True) if whole >= size)


async def test_deleted_under_a_stream(client: Client) -> None:
    await client.create("a", 64 * MIB)
    reading = client.stub.ReadArena(pb.ReadArenaRequest(arena="a"))
    first = await reading.read()
    assert isinstance(first, pb.ReadArenaResponse) and len(first.data) == CHUNK
    writing = client.stub.WriteArena()
    await writing.write(target("a"))
    await writing.write(chunk(0, b"x"))
    await eventually(lambda: _begins_with(client, "a", b"x"))
    await client.delete("a")
    await client.create("a", PAGE)
    async with refused(Code.NOT_FOUND):
        await rest(reading)
    async with refused(Code.NOT_FOUND) as trailer:
        await writing.write(chunk(0, b"y"))
        await writing.done_writing()
        await writing
    assert trailer["samepage-written-bytes"] == "1"
    # nothing of it went to the next arena of that name
    assert await client.read("a") == bytes(PAGE)


async def _begins_with(client: Client, arena: str, data: bytes) -> bool:
    return await client.read(arena, 0, len(data)) == data


async def test_a_write_that_breaks_in_the_middle(client: Client) -> None:
    """Chunks that came are there, whole; the same again makes it complete."""
    data = content(3, 4 * MIB // PAGE)
    await client.create("a", len(data))
    writing = client.stub.WriteArena()
    await writing.write(target("a"))
    for at in (0, CHUNK):
        await writing.write(chunk(at, data[at : at + CHUNK]))
    await eventually(lambda: _begins_with(client, "a", data[: 2 * CHUNK]))
    writing.cancel()
    assert await client.read("a") == data[: 2 * CHUNK] + bytes(2 * CHUNK)
    await eventually(lambda: _streams_are(client, 0))
    for _ in range(2):
        assert await client.write("a", data) == len(data)
        assert await client.read("a") == data


async def _streams_are(client: Client, count: int) -> bool:
    return (await client.status()).streams == count


@pytest.mark.parametrize(
    ("requests", "code", "text"),
    [
        ([], Code.INVALID_ARGUMENT, "first message"),
        ([chunk(0, b"x")], Code.INVALID_ARGUMENT, "first message"),
        ([pb.WriteArenaRequest()], Code.INVALID_ARGUMENT, "first message"),
        ([target("none")], Code.NOT_FOUND, "'none'"),
        ([target("a", "red")], Code.NOT_FOUND, "'red'"),
        ([target("a"), chunk(0, b"good"), target("a")], Code.INVALID_ARGUMENT, "chunk"),
        ([target("a"), chunk(0, b"good"), pb.WriteArenaRequest()], Code.INVALID_ARGUMENT, "chunk"),
        ([target("a"), chunk(0, b"good"), chunk(0, bytes(CHUNK + 1))], Code.INVALID_ARGUMENT, ""),
        ([target("a"), chunk(0, b"good"), chunk(2 * PAGE, b"x")], Code.OUT_OF_RANGE, "beyond"),
        ([target("a"), chunk(0, b"good"), chunk(2**64 - 1, b"x")], Code.OUT_OF_RANGE, "beyond"),
        ([target("a"), chunk(0, b"good"), chunk(PAGE, bytes(PAGE + 1))], Code.OUT_OF_RANGE, ""),
    ],
)
async def test_a_bad_write(
    client: Client, requests: list[pb.WriteArenaRequest], code: grpc.StatusCode, text: str
) -> None:
    """What came before stays, of the bad chunk comes nothing, and the answer counts."""
    await client.create("a", 2 * PAGE)
    async with refused(code, text) as trailer:
        await client.stub.WriteArena(iter(requests))
    good = b"good" if len(requests) == 3 else b""
    assert trailer["samepage-written-bytes"] == str(len(good))
    assert await client.read("a") == good.ljust(2 * PAGE, b"\0")


@pytest.mark.parametrize(
    ("offset", "length"), [(2 * PAGE + 1, 0), (0, 2 * PAGE + 1), (PAGE, PAGE + 1), (2**64 - 1, 9)]
)
async def test_a_bad_read(client: Client, offset: int, length: int) -> None:
    await client.create("a", 2 * PAGE)
    async with refused(Code.OUT_OF_RANGE, "beyond"):
        await client.read("a", offset, length)


@pytest.mark.parametrize(
    ("arena", "size", "domain", "code", "text"),
    [
        ("", 1, "", Code.INVALID_ARGUMENT, "name"),
        ("a/b", 1, "", Code.INVALID_ARGUMENT, "'/'"),
        ("n" * 128, 1, "", Code.INVALID_ARGUMENT, "127"),
        ("n\0", 1, "", Code.INVALID_ARGUMENT, "NUL"),
        ("n", 0, "", Code.INVALID_ARGUMENT, "not positive"),
        ("n", 1, "Red", Code.INVALID_ARGUMENT, "domain"),
        ("n", 2**64 - 1, "", Code.RESOURCE_EXHAUSTED, "hold_limit_bytes"),
        ("taken", 1, "", Code.ALREADY_EXISTS, "held already"),
        ("application's", 1, "", Code.ALREADY_EXISTS, "on this host"),
    ],
)
async def test_a_bad_arena(
    up: Up, client: Client, arena: str, size: int, domain: str, code: grpc.StatusCode, text: str
) -> None:
    await client.create("taken", PAGE)
    with Application(up.host()) as application:
        application.call("create", "application's", 1)
        async with refused(code, text):
            await client.create(arena, size, domain)
    assert await client.names() == ["taken"]
    assert (await client.status()).held_bytes == PAGE


@pytest.mark.parametrize("timeout", [0.0, -1.0, 600.1, float("nan"), float("inf")])
async def test_a_bad_timeout(client: Client, timeout: float) -> None:
    await client.create("a", PAGE)
    async with refused(Code.INVALID_ARGUMENT, "timeout"):
        await client.share("a", timeout_seconds=timeout)


async def test_discarded_pages_take_no_memory_and_read_as_zero(client: Client) -> None:
    data = content(7, 8)
    for name in ("a", "b"):
        await client.create(name, len(data))
        await client.write(name, data)
    await client.share("a")
    await client.discard("a", 2 * PAGE, 3 * PAGE)
    stats = await client.stat("a")
    assert (stats.shared_pages, stats.absent_pages) == (5, 3)
    assert await client.read("a") == data[: 2 * PAGE] + bytes(3 * PAGE) + data[5 * PAGE :]
    await client.write("a", b"again", 3 * PAGE)
    await client.discard("a", 4 * PAGE)
    assert await client.read("a") == data[: 2 * PAGE] + bytes(PAGE) + b"again".ljust(
        5 * PAGE, b"\0"
    )
    assert await client.read("b") == data
    await client.discard("a", 8 * PAGE)


async def test_a_sealed_arena_can_only_be_read(client: Client) -> None:
    data = content(7, 8)
    for name in ("a", "b"):
        await client.create(name, len(data))
        await client.write(name, data)
    sealing = pb.SealArenaRequest(arena="a")
    await asyncio.gather(client.stub.SealArena(sealing), client.stub.SealArena(sealing))
    async with refused(Code.FAILED_PRECONDITION, "can only be read"):
        await client.write("a", b"more")
    async with refused(Code.FAILED_PRECONDITION, "can only be read"):
        await client.discard("a", 0, PAGE)
    await client.share("a")
    stats = await client.stat("a")
    assert (stats.shared_pages, stats.arena.sealed) == (8, True)
    await client.write("b", b"own")
    assert await client.read("a") == data
    await client.delete("a")
    await client.create("a", PAGE)
    await client.write("a", b"anew")


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        (1, PAGE, Code.INVALID_ARGUMENT),
        (0, PAGE - 1, Code.INVALID_ARGUMENT),
        (PAGE, 2 * PAGE, Code.OUT_OF_RANGE),
        (2**64 - PAGE, PAGE, Code.OUT_OF_RANGE),
    ],
)
async def test_a_bad_discard(
    client: Client, offset: int, length: int, code: grpc.StatusCode
) -> None:
    await client.create("a", 2 * PAGE)
    await client.write("a", content(1, 2))
    async with refused(code):
        await client.discard("a", offset, length)
    assert await client.read("a") == content(1, 2)


async def test_no_arena_of_that_name(client: Client) -> None:
    for call in (
        client.read("none"),
        client.share("none"),
        client.stat("none"),
        client.delete("none"),
        client.discard("none", 0),
        client.write("none", b"x"),
        client.stub.UnshareArena(pb.UnshareArenaRequest(arena="none")),
    ):
        async with refused(Code.NOT_FOUND, "no arena 'none' of the domain 'default'"):
            await call


async def test_what_one_helper_holds_at_most(up: Up, tmp_path: Path) -> None:
    settings = {"hold_limit_bytes": 4 * PAGE, "arenas_max": 2, "node": "small"}
    async with limited(up, tmp_path, **settings) as client:
        async with refused(Code.RESOURCE_EXHAUSTED, "16.0 KiB left of 16.0 KiB"):
            await client.create("a", 4 * PAGE + 1)
        await client.create("a", 3 * PAGE)
        async with refused(Code.RESOURCE_EXHAUSTED, "4.0 KiB left"):
            await client.create("b", PAGE + 1)
        await client.create("b", PAGE)
        async with refused(Code.RESOURCE_EXHAUSTED, "2 arenas are held already"):
            await client.create("c", 1)
        status = await client.status()
        assert (status.node, status.arenas, status.arenas_max) == ("small", 2, 2)
        assert (status.held_bytes, status.hold_limit_bytes) == (4 * PAGE, 4 * PAGE)
        await client.delete("a")
        await client.create("c", 3 * PAGE)
        assert await client.names() == ["b", "c"]


async def test_how_many_streams_at_most(up: Up, tmp_path: Path) -> None:
    async with limited(up, tmp_path, streams_max=2) as client:
        await client.create("a", PAGE)
        writes = [client.stub.WriteArena() for _ in range(2)]
        for write in writes:
            await write.write(target("a"))
        await eventually(lambda: _streams_are(client, 2))
        async with refused(Code.RESOURCE_EXHAUSTED, "2 streams"):
            await client.read("a")
        async with refused(Code.RESOURCE_EXHAUSTED, "2 streams"):
            await client.write("a", b"x")
        for write in writes:
            await write.done_writing()
            assert (await write).written_bytes == 0
        assert await client.read("a") == bytes(PAGE)


async def test_streams_that_stand_still_are_ended(up: Up, tmp_path: Path) -> None:
    async with limited(up, tmp_path, idle_seconds=0.2) as client:
        await client.create("a", 64 * MIB)
        writing = client.stub.WriteArena()
        await writing.write(target("a"))
        await writing.write(chunk(0, b"kept"))
        async with refused(Code.DEADLINE_EXCEEDED, "stood still") as trailer:
            await writing
        assert trailer["samepage-written-bytes"] == "4"
        assert await client.read("a", 0, 4) == b"kept"
        reading = client.stub.ReadArena(pb.ReadArenaRequest(arena="a"))
        await reading.read()
        await eventually(lambda: _streams_are(client, 0))
        async with refused(Code.DEADLINE_EXCEEDED, "stood still"):
            await rest(reading)


async def test_writers_and_readers_at_the_same_time(client: Client) -> None:
    """Chunks are whole, whoever writes beside: each byte is one of those that were written."""
    size = 8 * MIB
    await client.create("a", size)
    await asyncio.gather(
        *(client.write("a", bytes([value]) * size) for value in (1, 2, 3)),
        *(client.read("a") for _ in range(3)),
    )
    found = await client.read("a")
    assert {found[at] for at in range(0, size, CHUNK)} <= {1, 2, 3}
    for at in range(0, size, CHUNK):
        assert found[at : at + CHUNK] == found[at : at + 1] * CHUNK


@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_calls(client: Client, seed: int) -> None:
    """Arenas hold what a bytearray would, whatever is shared and unshared in between."""
    rng = random.Random(seed)
    pages = 64
    common = content(6, pages)
    models = {name: bytearray(len(common)) for name in ("a", "b", "c")}
    for name in models:
        await client.create(name, len(common))
    shared = 0
    for _ in range(60):
        name = rng.choice("abc")
        start, end = sorted(rng.choices(range(len(common) + 1), k=2))
        match rng.choice(("write", "write", "change", "read", "share", "unshare", "discard")):
            case "write":
                models[name][start:end] = common[start:end]
                assert await client.write(name, common[start:end], start) == end - start
            case "change" if start < len(common):
                models[name][start : start + 1] = b"!"
                await client.write(name, b"!", start)
            case "read" if start < end:
                assert await client.read(name, start, end - start) == models[name][start:end]
            case "share":
                shared += (await client.share(name)).shared
            case "unshare":
                await client.stub.UnshareArena(pb.UnshareArenaRequest(arena=name))
            case "discard" if end - start > 2 * PAGE:
                start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
                models[name][start:end] = bytes(end - start)
                await client.discard(name, start, end - start)
    for name, model in models.items():
        assert await client.read(name) == model
    assert shared > 0


async def test_without_daemons(tmp_path: Path) -> None:
    """What needs a daemon says that it is away; bytes need none."""
    host = tmp_path / "host"
    host.mkdir()
    with contextlib.ExitStack() as stack:
        merger = stack.enter_context(contextlib.ExitStack())
        merger.enter_context(LoneMerger(host))
        helper = stack.enter_context(arenas_process(host, tmp_path))
        async with connected(await asyncio.to_thread(helper.address)) as client:
            await client.create("a", PAGE)
            async with refused(Code.UNAVAILABLE, "scanner"):
                await client.share("a")
            merger.close()
            async with refused(Code.UNAVAILABLE):
                await client.create("b", PAGE)
            await client.write("a", b"still here")
            assert (await client.read("a")).rstrip(b"\0") == b"still here"
            assert (await client.status()).held_bytes == PAGE
            assert await client.names() == ["a"]
            await client.delete("a")
        assert await asyncio.to_thread(helper.end) == 0


def test_without_a_merger_it_says_so(tmp_path: Path) -> None:
    helper = ArenasProcess(tmp_path, tmp_path)
    assert helper.process.wait(30) == 1
    assert "no merger answers" in helper.log and "Traceback" not in helper.log


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hold_limit_bytes": -1}, "hold_limit_bytes must be"),
        ({"arenas_max": 0}, "arenas_max must be"),
        ({"streams_max": 0}, "streams_max must be"),
        ({"idle_seconds": 0}, "idle_seconds must be"),
        ({"drain_seconds": -1}, "drain_seconds must be"),
        ({"listen": "nowhere"}, "give host:port"),
        ({"log_level": "loud"}, "log_level must be"),
    ],
)
def test_a_bad_setting(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    helper = ArenasProcess(tmp_path, tmp_path, **settings)
    assert helper.process.wait(30) == 2
    assert text in helper.log and "Traceback" not in helper.log


# All is loaded before: what is in the checkout may be unreadable for others.
_AS_NOBODY = """
import asyncio
import application
from samepage import native
from samepage.daemon.config import load
from samepage.daemon.server import run
from samepage_merger.holding.config import SECTION, Config
from samepage_merger.holding.service import ArenasService

async def main():
    await run(ArenasService(load(Config, SECTION)))

native.probe()
application.become(65534)
asyncio.run(main())
"""


async def test_it_needs_no_privilege(up: Up, tmp_path: Path) -> None:
    """As an ordinary user without a capability, it shares with a process of root."""
    folder = tmp_path / "nobody's"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for directory in (up.host(), *up.host().parents, *folder.parents):
        os.chmod(directory, directory.stat().st_mode | 0o011)
    with contextlib.ExitStack() as stack:
        helper = stack.enter_context(arenas_process(up.host(), folder, command=("-c", _AS_NOBODY)))
        async with connected(await asyncio.to_thread(helper.address)) as client:
            identity = Path(f"/proc/{helper.process.pid}/status").read_text()
            assert "Uid:\t65534\t65534" in identity and "CapEff:\t0000000000000000" in identity
            await client.create("a", 64 * PAGE)
            await client.write("a", content(4, 64))
            application = stack.enter_context(Application(up.host()))
            application.call("create", "b", 64)
            application.call("fill", "b", 4)
            assert (await client.share("a")).shared == 64
            assert await client.read("a") == content(4, 64)


async def test_it_drains(up: Up, tmp_path: Path) -> None:
    """A stream in flight ends in order; then nothing is left of the helper."""
    with arenas_process(up.host(), tmp_path, drain_seconds=20) as helper:
        async with connected(await asyncio.to_thread(helper.address)) as client:
            await client.create("a", 8 * MIB)
            writing = client.stub.WriteArena()
            await writing.write(target("a"))
            await eventually(lambda: _streams_are(client, 1))
            helper.process.send_signal(signal.SIGTERM)
            await eventually(lambda: asyncio.to_thread(lambda: not helper.ready_file.exists()))
            await writing.write(chunk(0, b"late"))
            await writing.done_writing()
            assert (await writing).written_bytes == 4
        assert await asyncio.to_thread(helper.process.wait, 30) == 0
        assert not helper.api_socket.exists()


async def test_status_and_list(up: Up, client: Client) -> None:
    await client.create("listed", PAGE)
    listed = await asyncio.to_thread(samepage, "arenas", "--dir", up.directory, "--json")
    (arena,) = json.loads(listed.stdout)
    assert (arena["name"], arena["pid"]) == ("listed", up.daemons()["host-1/arenas"])
    done = await asyncio.to_thread(samepage, "status", "--dir", up.directory, "--json")
    (host,) = json.loads(done.stdout)["hosts"]
    assert (host["arenas"]["node"], host["arenas"]["held_bytes"]) == ("host-1", PAGE)


async def test_killed(tmp_path: Path) -> None:
    """Its arenas end with it; those of others stay, and it comes back where it was, empty."""
    data = content(5, 256)
    with running(tmp_path) as up, Application(up.host()) as application:
        application.call("create", "b", 256)
        application.call("fill", "b", 5)
        async with connected(up.cluster.hosts[0].arenas) as client:
            await client.create("a", len(data))
            await client.write("a", data)
            assert (await client.share("a")).shared == 256
            writing = client.stub.WriteArena()
            await writing.write(target("a"))
            os.kill(up.daemons()["host-1/arenas"], signal.SIGKILL)
            async with refused(Code.UNAVAILABLE):
                await writing
        assert application.call("digest", "b") == hashlib.sha256(data).hexdigest()
        await asyncio.to_thread(up.wait_for, "message", "host-1/arenas serves again")
        async with connected(up.cluster.hosts[0].arenas) as client:
            assert await client.names() == []
            await client.create("a", len(data))
            await client.write("a", data)
            assert (await client.share("a")).shared == 256
            assert application.call("pagemap", "b") == [SHARED] * 256
            assert await client.read("a") == data
