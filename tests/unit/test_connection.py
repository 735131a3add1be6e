"""Data connections by themselves, with TLS and without: bytes arrive, and ends are told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.certificates import Authority

from samepage.daemon.roles import Role
from samepage.daemon.tls import Tls
from samepage_merger.cluster.connection import Connection

LONGEST = 8 << 20

Ends = tuple[Connection, Connection]


@pytest.fixture(params=["plain", "tls"])
async def ends(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ends]:
    """A connection: both ends of it."""
    tls = None
    if request.param == "tls":
        tls = Tls(Authority().role(tmp_path, Role.MERGER))
    one, other = tcp_pair()
    here, there = await asyncio.gather(_end(one, tls, server=False), _end(other, tls, server=True))
    yield here, there
    here.close()
    there.close()


async def _end(of: socket.socket, tls: Tls | None, *, server: bool) -> Connection:
    loop = asyncio.get_running_loop()
    connection = Connection(LONGEST)
    if server:
        context = tls.server_context() if tls is not None else None
        await loop.connect_accepted_socket(lambda: connection, of, ssl=context)
    else:
        name = Role.MERGER.dns_name if tls is not None else None
        context = tls.client_context() if tls is not None else None
        await loop.create_connection(lambda: connection, sock=of, ssl=context, server_hostname=name)
    return connection


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


def pattern(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(range(size % 251))


@pytest.mark.parametrize("size", [1, 4096, 300_000, LONGEST])
async def test_messages_arrive_whole_and_in_order(ends: Ends, size: int) -> None:
    here, there = ends
    data = memoryview(pattern(size))
    for third in (0, size // 3):
        parts = [data[:third], memoryview(b""), data[third:]]
        sending = asyncio.ensure_future(here.send(parts))
        assert await there.receive() == data
        await sending
    await there.send([b"answer"])
    assert bytes(await here.receive()) == b"answer"


async def test_a_message_in_many_parts_arrives(ends: Ends) -> None:
    here, there = ends
    data = pattern(300_000)
    parts = [memoryview(data)[low : low + 100] for low in range(0, len(data), 100)]
    sending = asyncio.ensure_future(here.send(parts))
    assert await there.receive() == data
    await sending


async def test_what_was_sent_before_anybody_asks_waits(ends: Ends) -> None:
    here, there = ends
    first, second = pattern(3 << 20), pattern(5 << 20)
    sending = asyncio.gather(here.send([first]))
    message = await there.receive()
    await sending
    assert message == first
    # Nobody takes these for now; what does not fit on the way is not sent.
    sending = asyncio.gather(_send_all(here, [first, second]))
    assert await there.receive() == first
    assert await there.receive() == second
    await sending


async def _send_all(connection: Connection, messages: list[bytes]) -> None:
    for message in messages:
        await connection.send([message])


async def test_whoever_waits_is_told_that_the_other_end_has_gone(ends: Ends) -> None:
    here, there = ends
    receiving = asyncio.ensure_future(here.receive())
    await asyncio.sleep(0)
    there.close()
    with pytest.raises(ConnectionError):
        await receiving
    with pytest.raises(ConnectionError):
        await here.receive()
    with pytest.raises(ConnectionError):
        await here.send([b"too late"])


async def test_whoever_sends_is_told_that_the_other_end_has_gone(ends: Ends) -> None:
    here, there = ends
    sending = asyncio.ensure_future(_send_all(here, [pattern(LONGEST)] * 8))
    assert len(await there.receive()) == LONGEST
    there.close()
    with pytest.raises(ConnectionError):
        await sending


async def test_closing_ends_what_goes_on(ends: Ends) -> None:
    here, _ = ends
    sending = asyncio.ensure_future(_send_all(here, [pattern(LONGEST)] * 8))
    receiving = asyncio.ensure_future(here.receive())
    while not sending.done() and not receiving.done():
        await asyncio.sleep(0)
        here.close()
    for each in (sending, receiving):
        with pytest.raises(ConnectionError):
            await each


@pytest.mark.parametrize("size", [0, LONGEST + 1, 2**32 - 1])
async def test_messages_of_no_sense_end_the_connection(size: int) -> None:
    one, other = tcp_pair()
    connection = await _end(other, None, server=True)
    one.sendall(struct.pack("<I", size) + b"more")
    with pytest.raises(ConnectionError, match=f"a message of {size} bytes"):
        await connection.receive()
    with one:
        assert one.recv(1) == b""


async def test_an_end_in_the_middle_of_a_message_is_an_end() -> None:
    one, other = tcp_pair()
    connection = await _end(other, None, server=True)
    with one:
        one.sendall(struct.pack("<I", 100) + b"half")
    with pytest.raises(ConnectionError, match="has ended the connection"):
        await connection.receive()
    connection.close()


async def test_nobody_without_a_certificate_is_let_in(tmp_path: Path) -> None:
    tls = Tls(Authority().role(tmp_path, Role.MERGER))
    one, other = tcp_pair()
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    serving = asyncio.ensure_future(_end(other, tls, server=True))
    connection = Connection(LONGEST)
    with pytest.raises(OSError):
        await asyncio.get_running_loop().create_connection(
            lambda: connection, sock=one, ssl=stranger, server_hostname="anybody"
        )
        await connection.receive()
    with pytest.raises(OSError):
        await serving
    connection.close()
