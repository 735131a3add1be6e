"""Mutual TLS: who gets in, and certificates that change under a server and its clients."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pkgutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.echo_service import Echo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.certificates import Authority, settings
from helpers.waiting import until

from samepage import v1
from samepage.daemon import roles
from samepage.daemon.addresses import is_local
from samepage.daemon.config import ConfigError
from samepage.daemon.roles import ANYONE, Role, allowed
from samepage.daemon.server import run
from samepage.daemon.tls import Channels, NetworkSettings, Tls, TlsFiles, open_channel


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roles.ALLOWED, "test.Echo", frozenset({Role.SCANNER}))


@asynccontextmanager
async def serving(tmp_path: Path, files: TlsFiles) -> AsyncIterator[dict[str, Any]]:
    """An Echo with TLS, in the role of the index; yields what its ready file says."""
    service = Echo(["127.0.0.1:0", f"unix:{tmp_path}/echo.sock"], tmp_path / "ready.json")
    service.tls_files = files
    service.health_listen = "127.0.0.1:0"
    running = asyncio.create_task(run(service))
    try:
        await until(service.ready_file.exists)
        yield json.loads(service.ready_file.read_text())
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await running


async def say(channel: grpc.aio.Channel, method: str = "/test.Echo/Stream") -> bytes:
    stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
    call = stream(b"hello", timeout=10)
    answer = await call.read()
    call.cancel()
    assert isinstance(answer, bytes)
    return answer


async def status_of(channel: grpc.aio.Channel) -> grpc.StatusCode:
    try:
        await say(channel)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_the_right_role_gets_in(tmp_path: Path) -> None:
    authority = Authority()
    scanner = Tls(authority.role(tmp_path, Role.SCANNER))
    async with (
        serving(tmp_path, authority.role(tmp_path, Role.INDEX)) as told,
        open_channel(told["address"], Role.INDEX, scanner) as channel,
    ):
        assert await say(channel) == b"hello"


async def test_another_role_is_told_why_not(tmp_path: Path) -> None:
    authority = Authority()
    merger = Tls(authority.role(tmp_path, Role.MERGER))
    async with (
        serving(tmp_path, authority.role(tmp_path, Role.INDEX)) as told,
        open_channel(told["address"], Role.INDEX, merger) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(channel)
        assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.value.details() == (
            "/test.Echo/Stream is for scanner.samepage, "
            "and the caller's certificate is for merger.samepage"
        )
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(channel, "/test.Echo/None")
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_service_that_is_not_in_the_table_is_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(roles.ALLOWED, "test.Echo")
    authority = Authority()
    scanner = Tls(authority.role(tmp_path, Role.SCANNER))
    async with (
        serving(tmp_path, authority.role(tmp_path, Role.INDEX)) as told,
        open_channel(told["address"], Role.INDEX, scanner) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="is for nobody"):
            await say(channel)


async def test_strangers_do_not_get_in(tmp_path: Path) -> None:
    authority = Authority()
    index = authority.role(tmp_path, Role.INDEX)
    stranger = Tls(Authority().role(tmp_path / "stranger", Role.SCANNER))
    trusting = grpc.ssl_channel_credentials(index.ca.read_bytes())
    name = [("grpc.ssl_target_name_override", Role.INDEX.dns_name)]
    async with serving(tmp_path, index) as told:
        address = told["address"]
        async with open_channel(address, Role.INDEX, stranger) as channel:
            assert await status_of(channel) is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.secure_channel(address, trusting, options=name) as channel:
            assert await status_of(channel) is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(address) as channel:
            assert await status_of(channel) is grpc.StatusCode.UNAVAILABLE


async def test_a_client_wants_the_role_that_it_calls(tmp_path: Path) -> None:
    """The scanner's certificate does not make a server an index."""
    authority = Authority()
    scanner = authority.role(tmp_path, Role.SCANNER)
    async with (
        serving(tmp_path, scanner) as told,
        open_channel(told["address"], Role.INDEX, Tls(scanner)) as channel,
    ):
        assert await status_of(channel) is grpc.StatusCode.UNAVAILABLE


async def test_unix_sockets_and_probes_need_no_certificate(tmp_path: Path) -> None:
    async with serving(tmp_path, Authority().role(tmp_path, Role.INDEX)) as told:
        async with grpc.aio.insecure_channel(told["addresses"][1]) as channel:
            assert await say(channel) == b"hello"
        async with grpc.aio.insecure_channel(told["health"]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service="test.Echo"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            # Health, and nothing else.
            assert await status_of(channel) is grpc.StatusCode.UNIMPLEMENTED


async def test_certificates_change_on_both_sides(tmp_path: Path) -> None:
    """From one authority to another, in the steps that an operator takes, without a restart."""
    old, new = Authority(), Authority()
    index = old.role(tmp_path, Role.INDEX)
    tls = Tls(old.role(tmp_path, Role.SCANNER))
    channels = Channels(Role.INDEX, tls)
    async with serving(tmp_path, index) as told:
        address = told["address"]
        first = channels.get(address)
        assert await say(first) == b"hello"
        assert channels.get(address) is first

        # Each trusts both, and then each has the new one's.
        old.role(tmp_path, Role.INDEX, also=new)
        old.role(tmp_path, Role.SCANNER, also=new)
        assert await say(channels.get(address)) == b"hello"
        new.role(tmp_path, Role.SCANNER, also=old)
        second = channels.get(address)
        assert second is not first
        assert await say(second) == b"hello"
        new.role(tmp_path, Role.INDEX)
        new.role(tmp_path, Role.SCANNER)
        assert await say(channels.get(address)) == b"hello"

        # Who stayed behind does not get in, whatever it did before.
        behind = Tls(old.role(tmp_path / "behind", Role.SCANNER, also=new))
        async with open_channel(address, Role.INDEX, behind) as channel:
            assert await status_of(channel) is grpc.StatusCode.UNAVAILABLE
    await channels.close()


async def test_a_change_that_is_only_half_there_changes_nothing(tmp_path: Path) -> None:
    authority = Authority()
    index = authority.role(tmp_path, Role.INDEX)
    tls = Tls(authority.role(tmp_path, Role.SCANNER))
    whole = index.key.read_bytes()
    async with serving(tmp_path, index) as told:
        for broken in (whole[:40], b"", authority.role(tmp_path, Role.MERGER).key.read_bytes()):
            index.key.write_bytes(broken)
            async with open_channel(told["address"], Role.INDEX, tls) as channel:
                assert await say(channel) == b"hello"
        index.key.unlink()
        async with open_channel(told["address"], Role.INDEX, tls) as channel:
            assert await say(channel) == b"hello"
        index.key.write_bytes(whole)
        async with open_channel(told["address"], Role.INDEX, tls) as channel:
            assert await say(channel) == b"hello"


async def test_a_call_in_flight_survives_a_change_of_certificates(tmp_path: Path) -> None:
    authority = Authority()
    channels = Channels(Role.INDEX, Tls(authority.role(tmp_path, Role.SCANNER)))
    async with serving(tmp_path, authority.role(tmp_path, Role.INDEX)) as told:
        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        stream = channels.get(told["address"]).unary_stream("/test.Echo/Stream")
        call = stream(b"hello")
        assert await call.read() == b"hello"
        authority.role(tmp_path, Role.SCANNER)
        assert await say(channels.get(told["address"])) == b"hello"
        assert not call.done()
    assert await call.read() == b"drained"
    await channels.close()


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
def test_files_that_will_not_do(tmp_path: Path, name: str) -> None:
    files = Authority().role(tmp_path, Role.INDEX)
    path = files.cert.parent / name
    path.write_text("no PEM\n")
    with pytest.raises(ConfigError, match=f"{name}.* in PEM"):
        Tls(files)
    path.unlink()
    with pytest.raises(ConfigError, match=f"cannot read .*{name}: No such file"):
        Tls(files)


def test_a_key_with_a_password_is_not_asked_for(tmp_path: Path) -> None:
    files = Authority().role(tmp_path, Role.INDEX)
    body = files.key.read_text().splitlines()
    head = ["Proc-Type: 4,ENCRYPTED", "DEK-Info: AES-128-CBC,00112233445566778899AABBCCDDEEFF", ""]
    files.key.write_text("\n".join([body[0], *head, *body[1:]]) + "\n")
    with pytest.raises(ConfigError, match="without a password"):
        Tls(files)


def test_beyond_this_machine_only_with_tls_or_by_word(tmp_path: Path) -> None:
    for address in ("0.0.0.0:7", "[::]:7", "10.1.2.3:7", "index:7"):
        with pytest.raises(ConfigError, match=r"beyond this machine.*set insecure = true"):
            NetworkSettings().check_network([address])
        with pytest.raises(ConfigError, match="beyond this machine"):
            NetworkSettings().check_network(["127.0.0.1:0"], [address])
        NetworkSettings(insecure=True).check_network([address])
        files: Any = settings(Authority().role(tmp_path, Role.INDEX))
        NetworkSettings(**files).check_network([address], [address])
    NetworkSettings(health_listen="0.0.0.0:0").check_network(["127.0.0.1:0", "unix:/x"], [""])


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    files: Any = settings(Authority().role(tmp_path, Role.INDEX))
    with pytest.raises(ConfigError, match="insecure is set, and so is TLS"):
        NetworkSettings(**files, insecure=True).check_network([])
    del files["tls_ca_file"]
    with pytest.raises(ConfigError, match="go together: set all three, or none"):
        NetworkSettings(**files).check_network([])
    with pytest.raises(ConfigError, match="give host:port"):
        NetworkSettings(health_listen="7070").check_network([])


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/x", True),
        ("[::]:1", False),
        ("192.168.1.1:1", False),
        ("localhost.example:1", False),
        ("dns:///index:1", False),
    ],
)
def test_which_addresses_are_local(address: str, local: bool) -> None:
    assert is_local(address) is local


def test_every_service_is_in_the_table() -> None:
    names = [name for _, name, _ in pkgutil.iter_modules(v1.__path__) if name.endswith("_pb2")]
    files = [importlib.import_module(f"samepage.v1.{name}") for name in names]
    methods = {
        f"{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert all(allowed(f"/{method}") for method in methods)
    # The table names nothing that is not there.
    services = {method.partition("/")[0] for method in methods}
    known = methods | services | {"test.Echo"}
    assert {name for name in roles.ALLOWED if not name.startswith("grpc.")} <= known


def test_who_may_do_what() -> None:
    assert allowed("/samepage.v1.Index/Publish") == {Role.SCANNER}
    assert Role.SCANNER not in allowed("/samepage.v1.Merger/SetPolicy")
    assert Role.INDEX not in allowed("/samepage.v1.Merger/Merge")
    assert allowed("/grpc.health.v1.Health/Check") == ANYONE
    assert allowed("/other.Service/Method") == frozenset()
