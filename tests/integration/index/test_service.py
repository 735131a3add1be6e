"""The index as a process: its calls, its Redis coming and going, its start and its end."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
from pathlib import Path

import grpc
import pytest
import trustme
from helpers.index_harness import (
    DEADLINE,
    Books,
    Client,
    RedisServer,
    Stream,
    connected,
    eventually,
)
from helpers.redis_cluster import free_ports

from samepage.v1 import index_pb2 as pb

from .conftest import StartIndex

DOMAIN = b"d" * 16
OTHER_DOMAIN = b"o" * 16
PAGES = [number.to_bytes(2, "big") * 8 for number in range(1_000)]

needs_redis = pytest.mark.needs("redis")


async def refused(stream: Stream, kind: dict[str, object]) -> tuple[grpc.StatusCode, str]:
    """How the stream ends after a request."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stream.send(**kind)
    return error.value.code(), error.value.details() or ""


async def serving_is(client: Client, expected: bool) -> None:
    async def look() -> bool:
        return await client.serving() is expected

    await eventually(look)


def child_of(parent: int) -> int:
    """Process id of the only child."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


async def ended(pid: int) -> None:
    async def look() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        return state == "Z"

    await eventually(look)


async def test_two_hosts_on_the_embedded_server(start_index: StartIndex) -> None:
    process = start_index(lease_seconds=20)
    async with connected(await process.ready()) as client:
        assert await client.serving()
        alpha, beta = client.stream(), client.stream()
        response = await alpha.send(announce=pb.Announce(host="alpha", epoch=1))
        assert response.announced == pb.Announced(resumed=False, lease_ms=20_000)
        await beta.announce("beta", 2)
        assert await alpha.publish(DOMAIN, PAGES[:600]) == 0
        assert await beta.publish(DOMAIN, PAGES[400:]) == 200
        assert await beta.publish(DOMAIN, [], PAGES[900:]) == 0
        assert await beta.publish(OTHER_DOMAIN, PAGES) == 0
        expected = {page: {"alpha"} for page in PAGES[:600]}
        for page in PAGES[400:900]:
            expected.setdefault(page, set()).add("beta")
        assert await client.holders(DOMAIN, PAGES) == expected
        assert await client.holders(bytes(16), PAGES) == {}
        stats = await client.stats()
        assert (stats.entries, stats.fingerprints, stats.hosts) == (2_100, 1_900, 2)
        assert 10 * stats.entries < stats.stored_bytes < 60 * stats.entries
        assert stats.store.startswith("valkey ")
        assert stats.store.endswith(" (embedded)")
        host = (await client.stub.ListHosts(pb.ListHostsRequest())).hosts[1]
        assert (host.name, host.epoch, host.merger_address) == ("beta", 2, "beta:7000")
        assert 0 < host.lease_remaining_ms <= 20_000
        assert await alpha.renew()


async def test_bad_first_requests(start_index: StartIndex) -> None:
    no_announce = "first request of a stream must be an Announce"
    bad: list[tuple[dict[str, object], str]] = [
        ({"renew": pb.Renew()}, no_announce),
        ({"batch": pb.Batch(domain_id=DOMAIN)}, no_announce),
        ({"leave": pb.Leave()}, no_announce),
        ({}, "an Announce, a Batch, a Renew or a Leave"),
        ({"announce": pb.Announce(host="a/b", epoch=1)}, "host name 'a/b' is not valid"),
        ({"announce": pb.Announce(host="a")}, "epoch must not be 0"),
        ({"announce": pb.Announce(host="a", epoch=1, merger_address="x" * 513)}, "512 characters"),
    ]
    async with connected(await start_index().ready()) as client:
        for kind, told in bad:
            code, text = await refused(client.stream(), kind)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert told in text


async def test_a_name_that_is_taken(start_index: StartIndex) -> None:
    async with connected(await start_index().ready()) as client:
        stream = client.stream()
        await stream.announce("alpha")
        other = pb.Announce(host="alpha", epoch=2, merger_address="elsewhere:7000")
        code, text = await refused(client.stream(), {"announce": other})
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "alpha:7000" in text
        assert (await stream.send(leave=pb.Leave())).HasField("left")
        await client.stream().send(announce=other)


async def test_bad_lengths(start_index: StartIndex) -> None:
    many = bytes(16 * 65_537)
    bad = [
        (pb.Batch(domain_id=b"short"), "domain_id has 5 bytes, not 16"),
        (pb.Batch(domain_id=DOMAIN, added=b"x" * 17), "added has 17 bytes"),
        (pb.Batch(domain_id=DOMAIN, removed=b"x"), "removed has 1 bytes"),
        (pb.Batch(domain_id=DOMAIN, added=many), "65537 fingerprints: send at most 65536"),
    ]
    async with connected(await start_index().ready()) as client:
        for batch, told in bad:
            stream = client.stream()
            await stream.announce("alpha")
            code, text = await refused(stream, {"batch": batch})
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert told in text
        for lookup in (
            pb.LookupRequest(domain_id=b"", fingerprints=bytes(16)),
            pb.LookupRequest(domain_id=DOMAIN, fingerprints=b"x"),
            pb.LookupRequest(domain_id=DOMAIN, fingerprints=many),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.stub.Lookup(lookup)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream = client.stream()
        await stream.announce("alpha")
        assert await stream.publish(DOMAIN) == 0
        assert await client.holders(DOMAIN, []) == {}


@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=needs_redis)])
async def test_redis_away_in_mid_stream(start_index: StartIndex, tmp_path: Path, kind: str) -> None:
    server = RedisServer(kind, tmp_path)
    try:
        async with connected(await start_index(redis_url=server.url).ready()) as client:
            stream = client.stream()
            await stream.announce("alpha")
            await stream.publish(DOMAIN, PAGES)
            assert (await client.stats()).store.startswith(f"{kind} ")
            server.kill()
            code, text = await refused(stream, {"batch": pb.Batch(domain_id=DOMAIN)})
            assert code is grpc.StatusCode.UNAVAILABLE
            assert f"Redis at {server.socket} refuses or broke the connection" in text
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.hosts()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            await serving_is(client, False)

            server.start()
            await serving_is(client, True)
            again = client.stream()
            assert not await again.announce("alpha"), "its data is lost"
            assert await again.publish(DOMAIN, PAGES[:10]) == 0
            assert set(await client.holders(DOMAIN, PAGES)) == set(PAGES[:10])
    finally:
        server.kill()


@needs_redis
async def test_redis_back_with_old_data(start_index: StartIndex, tmp_path: Path) -> None:
    """What a host published after the snapshot is missing, so it must publish anew."""
    server = RedisServer("redis", tmp_path)
    try:
        async with (
            connected(await start_index(redis_url=server.url).ready()) as client,
            Books(server.url) as books,
        ):
            stream = client.stream()
            await stream.announce("alpha")
            await stream.publish(DOMAIN, PAGES[:500])
            await books.store.run([("SAVE",)])
            await stream.publish(DOMAIN, PAGES[500:], PAGES[:500])
            server.kill()
            server.start()
            await serving_is(client, True)
            assert await client.holders(DOMAIN, PAGES) == {}
            again = client.stream()
            assert not await again.announce("alpha")
            assert await again.publish(DOMAIN, PAGES[500:]) == 0
            assert set(await client.holders(DOMAIN, PAGES)) == set(PAGES[500:])
    finally:
        server.kill()


@needs_redis
async def test_flushed_in_mid_stream(start_index: StartIndex, tmp_path: Path) -> None:
    server = RedisServer("redis", tmp_path)
    try:
        async with connected(await start_index(redis_url=server.url).ready()) as client:
            stream = client.stream()
            await stream.announce("alpha")
            await stream.publish(DOMAIN, PAGES)
            server.flush()
            assert not await stream.renew()
            assert not await stream.announce("alpha")
            assert await stream.publish(DOMAIN, PAGES) == 0
            server.flush()
            code, text = await refused(stream, {"batch": pb.Batch(domain_id=DOMAIN)})
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "announce again" in text
    finally:
        server.kill()


@pytest.mark.parametrize("kind", ["valkey", pytest.param("redis", marks=needs_redis)])
async def test_two_indexes_on_one_redis(start_index: StartIndex, tmp_path: Path, kind: str) -> None:
    """Both publish the same and other pages at once; the books equal a dict's."""
    server = RedisServer(kind, tmp_path)
    chooser = random.Random(2)
    pages = [chooser.randbytes(16) for _ in range(20_000)]
    expected: dict[bytes, set[str]] = {}

    async def publish(client: Client, host: str) -> None:
        stream = client.stream()
        await stream.announce(host)
        held: set[bytes] = set()
        for _ in range(12):
            added, removed = chooser.sample(pages, 4_000), chooser.sample(pages, 1_000)
            await stream.publish(DOMAIN, added, removed)
            held = (held - set(removed)) | set(added)
        for page in held:
            expected.setdefault(page, set()).add(host)

    try:
        processes = [start_index(redis_url=server.url) for _ in range(2)]
        first, second = [await process.ready() for process in processes]
        async with connected(first) as one, connected(second) as two:
            await asyncio.gather(
                *(publish(client, f"host-{i}") for i, client in enumerate((one, two, one, two)))
            )
            for client in (one, two):
                assert await client.holders(DOMAIN, pages) == expected
                stats = await client.stats()
                assert stats.entries == sum(map(len, expected.values()))
                assert stats.fingerprints == len(expected)
                assert stats.hosts == 4
    finally:
        server.kill()


async def test_leases_end_and_are_swept(start_index: StartIndex) -> None:
    process = start_index(lease_seconds=0.2, sweep_seconds=2.0, redis_timeout_seconds=2.0)
    async with connected(await process.ready()) as client:
        stream = client.stream()
        await stream.announce("alpha")
        await stream.publish(DOMAIN, PAGES)

        async def swept() -> bool:
            return (await client.stats()).entries == 0

        await eventually(swept)
        assert await client.hosts() == []
        assert not await stream.renew()


async def test_embedded_server_ends_with_a_killed_index(start_index: StartIndex) -> None:
    process = start_index()
    await process.ready()
    server = child_of(process.process.pid)
    assert "valkey-server" in Path(f"/proc/{server}/cmdline").read_text()
    process.kill()
    await ended(server)


async def test_temporary_directories_of_killed_indexes_are_removed(
    start_index: StartIndex, tmp_path: Path
) -> None:
    killed, running = start_index(), start_index()
    await killed.ready()
    await running.ready()
    killed.kill()
    assert len(list(tmp_path.glob("samepage-index-*/valkey.sock"))) == 2
    stopped = start_index()
    await stopped.ready()
    assert len(list(tmp_path.glob("samepage-index-*/valkey.sock"))) == 2
    stopped.process.terminate()
    await stopped.wait()
    assert len(list(tmp_path.glob("samepage-index-*"))) == 1
    async with connected(await running.ready()) as client:
        assert await client.serving()
        assert (await client.stats()).entries == 0


async def test_embedded_server_that_dies_is_replaced(start_index: StartIndex) -> None:
    process = start_index()
    async with connected(await process.ready()) as client:
        stream = client.stream()
        await stream.announce("alpha")
        await stream.publish(DOMAIN, PAGES)
        server = child_of(process.process.pid)
        os.kill(server, signal.SIGKILL)
        await ended(server)

        async def announced() -> bool:
            try:
                assert not await client.stream().announce("alpha")
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                return False
            return True

        await eventually(announced)
        await serving_is(client, True)
        assert (await client.stats()).entries == 0
        assert child_of(process.process.pid) != server


async def test_stops_gracefully(start_index: StartIndex, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    process = start_index(data_dir=data_dir, drain_seconds=30)
    async with connected(await process.ready()) as client:
        stream = client.stream()
        await stream.announce("alpha")
        server = child_of(process.process.pid)
        process.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in (error.value.details() or "")
        assert await process.wait() == 0
    await ended(server)
    assert not process.ready_file.exists()
    assert not (data_dir / "valkey.sock").exists()


async def test_data_dir_in_use(start_index: StartIndex, tmp_path: Path) -> None:
    first = start_index(data_dir=tmp_path)
    await first.ready()
    second = start_index(data_dir=tmp_path)
    assert await second.wait() == 2
    assert "another index runs in data_dir" in second.log
    async with connected(await first.ready()) as client:
        assert await client.serving()


def url_of_nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"redis://127.0.0.1:{server.getsockname()[1]}"


async def test_start_with_redis_refusing(start_index: StartIndex) -> None:
    url = url_of_nobody()
    process = start_index(redis_url=url)
    assert await process.wait() == 1
    assert f"Redis at {url.removeprefix('redis://')} refuses" in process.log
    assert "Traceback" not in process.log


@needs_redis
async def test_start_with_passwords(start_index: StartIndex, tmp_path: Path) -> None:
    server = RedisServer("redis", tmp_path, "--requirepass", "right horse")
    try:
        for settings in ({}, {"redis_password_file": tmp_path / "wrong"}):
            (tmp_path / "wrong").write_text("wrong horse\n")
            process = start_index(redis_url=server.url, **settings)
            assert await process.wait() == 1
            assert "does not accept the password or user, correct redis_url" in process.log
            assert "horse" not in process.log
        (tmp_path / "right").write_text("right horse\n")
        process = start_index(redis_url=server.url, redis_password_file=tmp_path / "right")
        async with connected(await process.ready()) as client:
            assert await client.serving()
        process = start_index(redis_url=f"unix://:right%20horse@{server.socket}")
        await process.ready()
    finally:
        server.kill()


async def fake_redis(version: str) -> asyncio.Server:
    """Speaks just enough of Redis's protocol to say which version it is."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = f"redis_version:{version}\r\n".encode()
        while line := await reader.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            info = b"$%d\r\n%b\r\n" % (len(text), text)
            writer.write(info if words[0] == b"INFO" else b"+OK\r\n")
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


async def test_start_with_an_old_redis(start_index: StartIndex) -> None:
    async with await fake_redis("6.2.14") as server:
        port = server.sockets[0].getsockname()[1]
        process = start_index(redis_url=f"redis://127.0.0.1:{port}")
        assert await process.wait() == 1
        assert f"127.0.0.1:{port} is version 6.2.14: 7 or newer is needed" in process.log


@needs_redis
async def test_start_with_a_cluster_by_a_socket(start_index: StartIndex, tmp_path: Path) -> None:
    server = RedisServer("redis", tmp_path, "--cluster-enabled", "yes")
    try:
        process = start_index(redis_url=server.url)
        assert await process.wait() == 1
        assert "part of a Redis Cluster, for which redis_url will not do" in process.log
    finally:
        server.kill()


@needs_redis
async def test_redis_without_memory(start_index: StartIndex, tmp_path: Path) -> None:
    server = RedisServer("redis", tmp_path)
    try:
        async with (
            connected(await start_index(redis_url=server.url).ready()) as client,
            Books(server.url) as books,
        ):
            stream = client.stream()
            await stream.announce("alpha")
            await books.store.run([("CONFIG", "SET", "maxmemory", "1mb")])
            code, text = await refused(stream, {"batch": pb.Batch(domain_id=DOMAIN)})
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "out of memory, raise its maxmemory" in text
            await books.store.run([("CONFIG", "SET", "maxmemory", "0")])
            assert await client.stream().announce("alpha")
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lease_seconds": "0"}, "lease_seconds must be 0.1 to 3600"),
        ({"listen": "7171"}, "cannot listen on '7171': give host:port"),
        ({"redis_url": "http://x"}, "redis_url is not valid"),
        ({"redis_password_file": "/none"}, "redis_password_file is set but redis_url is not"),
        ({"sweep_seconds": "1"}, "sweep_seconds must be at least redis_timeout_seconds"),
        ({"key_prefix": "{x}"}, "key_prefix must not be empty, nor hold braces"),
        ({"data_dir": "/" + "d" * 120}, "data_dir is too long for a unix socket"),
        ({"colour": "red"}, "there is no such setting"),
    ],
)
async def test_start_with_a_wrong_setting(
    start_index: StartIndex, settings: dict[str, str], told: str
) -> None:
    process = start_index(**settings)
    assert await asyncio.wait_for(process.wait(), DEADLINE) == 2
    assert process.log.startswith("samepage-index: ")
    assert told in process.log
    assert len(process.log.splitlines()) == 1


@needs_redis
async def test_tls_both_ways(start_index: StartIndex, tmp_path: Path) -> None:
    """Redis shows a certificate and wants one; without the right files the index says why not."""
    authority, other = trustme.CA(), trustme.CA()
    files = {"ca": authority.cert_pem, "other": other.cert_pem}
    for name in ("server", "client"):
        pair = authority.issue_cert("localhost", "127.0.0.1")
        files[name] = pair.private_key_and_cert_chain_pem
    for name, pem in files.items():
        pem.write_to_path(str(tmp_path / f"{name}.pem"))
    paths = {name: tmp_path / f"{name}.pem" for name in files}
    (port,) = free_ports(1)
    options = ["--tls-port", str(port), "--tls-auth-clients", "yes"]
    options += ["--tls-cert-file", str(paths["server"]), "--tls-key-file", str(paths["server"])]
    options += ["--tls-ca-cert-file", str(paths["ca"])]
    server = RedisServer("redis", tmp_path, *options)
    url = f"rediss://localhost:{port}"
    try:
        process = start_index(
            redis_url=url, redis_ca_file=paths["ca"], redis_cert_file=paths["client"]
        )
        async with connected(await process.ready()) as client:
            stream = client.stream()
            await stream.announce("alpha")
            await stream.publish(DOMAIN, PAGES)
            assert set(await client.holders(DOMAIN, PAGES)) == set(PAGES)
        stranger = start_index(
            redis_url=url, redis_ca_file=paths["other"], redis_cert_file=paths["client"]
        )
        assert await stranger.wait() == 1
        assert "certificate verify failed" in stranger.log
        nobody = start_index(redis_url=url, redis_ca_file=paths["ca"])
        assert await nobody.wait() == 1
        assert f"Redis at localhost:{port}" in nobody.log
    finally:
        server.kill()


@needs_redis
async def test_the_documented_rights_are_enough(start_index: StartIndex, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "index.md").read_text()
    found = re.search(r"^ACL SETUSER index (.*)$", text, re.MULTILINE)
    assert found is not None
    rights = found[1].replace("PASSWORD", "secret").split()
    server = RedisServer("redis", tmp_path, "--user", "index", *rights)
    try:
        process = start_index(
            redis_url=f"unix://index:secret@{server.socket}",
            lease_seconds=2.0,
            sweep_seconds=2.0,
            redis_timeout_seconds=2.0,
        )
        async with connected(await process.ready()) as client:
            stream = client.stream()
            await stream.announce("alpha")
            await stream.publish(DOMAIN, PAGES)
            await stream.publish(DOMAIN, [], PAGES[:500])
            assert set(await client.holders(DOMAIN, PAGES)) == set(PAGES[500:])

            async def swept() -> bool:
                return (await client.stats()).entries == 0

            await eventually(swept)
        assert "does not permit" not in process.log
        assert "cannot sweep" not in process.log
    finally:
        server.kill()
