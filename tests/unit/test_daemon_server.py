"""The server runner: ready file, health, listening, drain, the second signal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.echo_service import Echo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from samepage.daemon.addresses import check_listen
from samepage.daemon.config import ConfigError
from samepage.daemon.server import ListenError, run
from samepage.errors import SamepageError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_stub(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def ready(path: Path) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while not path.exists():
            await asyncio.sleep(0.005)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


async def test_serves_and_drains(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    unix = f"unix:{tmp_path}/echo.sock"
    service = Echo(["127.0.0.1:0", unix], ready_file)
    running = asyncio.create_task(run(service))
    told = await ready(ready_file)
    assert told["pid"] == os.getpid()
    assert told["addresses"] == [told["address"], unix]
    assert stat.S_IMODE((tmp_path / "echo.sock").stat().st_mode) == 0o600
    async with (
        grpc.aio.insecure_channel(told["address"]) as channel,
        grpc.aio.insecure_channel(unix) as local,
    ):
        health = health_stub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="test.Echo"))
        assert (await watch.read()).status == SERVING
        service.health.set("redis", False)
        assert (await watch.read()).status == NOT_SERVING
        service.health.set("redis", True)
        assert (await watch.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND

        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        stream = local.unary_stream("/test.Echo/Stream")
        call = stream(b"hello")
        assert await call.read() == b"hello"
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        assert await call.read() == b"drained"
        async with asyncio.timeout(service.drain_seconds / 2):
            await running
    assert service.steps == ["start", "drain", "close"]
    assert not ready_file.exists()


async def test_not_serving_while_a_dependency_is_away_from_the_start(tmp_path: Path) -> None:
    service = Echo(["127.0.0.1:0"], tmp_path / "ready.json")
    service.health.set("merger", False)
    running = asyncio.create_task(run(service))
    told = await ready(service.ready_file)
    async with grpc.aio.insecure_channel(told["address"]) as channel:
        health = health_stub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        service.health.set("merger", True)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
    os.kill(os.getpid(), signal.SIGINT)
    await running


async def test_reflection_is_offered_when_asked(tmp_path: Path) -> None:
    for offered in (False, True):
        service = Echo(["127.0.0.1:0"], tmp_path / "ready.json")
        service.reflection = offered
        running = asyncio.create_task(run(service))
        told = await ready(service.ready_file)
        async with grpc.aio.insecure_channel(told["address"]) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
            call = stub.ServerReflectionInfo()
            if offered:
                await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
                answer = await call.read()
                names = [s.name for s in answer.list_services_response.service]
                assert "test.Echo" in names
                await call.done_writing()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call.read()
                assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        os.kill(os.getpid(), signal.SIGTERM)
        await running


async def test_address_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        service = Echo([f"127.0.0.1:{other.getsockname()[1]}"], tmp_path / "ready.json")
        with pytest.raises(ListenError, match=r"cannot listen on 127\.0\.0\.1:.*in use"):
            await run(service)
    assert service.steps == ["start", "close"]


async def test_ready_file_in_a_missing_directory(tmp_path: Path) -> None:
    service = Echo(["127.0.0.1:0"], tmp_path / "none" / "ready.json")
    with pytest.raises(ConfigError, match=r"cannot write the ready file .*No such file"):
        await run(service)
    assert service.steps == ["start", "drain", "close"]


async def test_failed_start_closes(tmp_path: Path) -> None:
    class Failing(Echo):
        async def start(self) -> None:
            raise SamepageError("no")

    service = Failing(["127.0.0.1:0"], tmp_path / "ready.json")
    with pytest.raises(SamepageError, match="no"):
        await run(service)
    assert service.steps == ["close"]


async def test_signal_during_start(tmp_path: Path) -> None:
    class Slow(Echo):
        async def start(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

    service = Slow(["127.0.0.1:0"], tmp_path / "ready.json")
    await run(service)
    assert service.steps == ["close"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_second_signal_exits_at_once(tmp_path: Path, number: signal.Signals) -> None:
    program = """
import asyncio, pathlib, sys
from fakes.echo_service import Echo
from samepage.daemon.server import run

class Stuck(Echo):
    drain_seconds = 600.0
    async def drain(self):
        print("draining", flush=True)
        await asyncio.Event().wait()

async def main():
    await run(Stuck(["127.0.0.1:0"], pathlib.Path(sys.argv[1])))

asyncio.run(main())
"""
    ready_file = tmp_path / "ready.json"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(ready_file)], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            await ready(ready_file)
            process.send_signal(number)
            assert process.stdout is not None
            while process.stdout.readline() != "draining\n":
                assert process.poll() is None
            process.send_signal(number)
            assert process.wait(10) == 128 + number
        finally:
            process.kill()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:7070", "host:65535", "unix:/run/x"])
def test_valid_addresses(address: str) -> None:
    assert check_listen(address) == address


@pytest.mark.parametrize("address", ["", "7070", ":7070", "host:", "host:65536", "h:x", "unix:"])
def test_invalid_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="give host:port"):
        check_listen(address)
