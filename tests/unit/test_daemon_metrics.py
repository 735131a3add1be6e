"""Serving metrics: formats, wrong requests, slow and many clients, and what all services tell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
import structlog
from fakes.echo_service import Echo
from helpers.scrape import scrape
from helpers.waiting import until
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain

from samepage.daemon import logs, metrics
from samepage.daemon.config import ConfigError
from samepage.daemon.metrics import (
    MetricsServer,
    check_metrics_listen,
    common,
    counter,
    gauge,
    histogram,
)
from samepage.daemon.server import ListenError, run


async def collect() -> Iterable[Metric]:
    return [
        counter("test_pages", "Pages.", {"merged": 5, "busy": 0}, "outcome"),
        gauge("test_agents", "Agents.", 3),
        histogram("test_seconds", "Seconds.", [0.5, 1.0], [1, 0, 2]),
    ]


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = MetricsServer(collect)
    yield await server.start("127.0.0.1:0")
    await server.stop()


async def ask(address: str, request: bytes) -> tuple[str, dict[str, str], bytes]:
    """Return status, headers and body of an answer; the connection ends after it."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return status.partition(" ")[2], headers, body


def get(accept: str = "", method: str = "GET", target: str = "/metrics") -> bytes:
    accepting = f"Accept: {accept}\r\n" if accept else ""
    return f"{method} {target} HTTP/1.1\r\nHost: here\r\n{accepting}\r\n".encode()


async def test_the_plain_format(address: str) -> None:
    status, headers, body = await ask(address, get())
    assert status.startswith("200") and headers["content-type"].startswith("text/plain; version=")
    assert int(headers["content-length"]) == len(body) and headers["connection"] == "close"
    families = {family.name: family for family in plain(body.decode())}
    pages = {sample.labels["outcome"]: sample.value for sample in families["test_pages"].samples}
    assert pages == {"merged": 5, "busy": 0}
    assert families["test_agents"].samples[0].value == 3
    buckets = {one.labels["le"]: one.value for one in families["test_seconds"].samples}
    assert buckets == {"0.5": 1, "1.0": 1, "+Inf": 3}


async def test_open_metrics_when_that_is_accepted(address: str) -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.8, text/plain;q=0.2"
    status, headers, body = await ask(address, get(accept))
    assert status.startswith("200")
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {
        family.name: family
        for family in open_metrics(body.decode())  # type: ignore[no-untyped-call]
    }
    assert families["test_pages"].type == "counter"


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=x", "nonsense", "*/*"])
async def test_an_accept_that_makes_no_sense_gets_an_answer(address: str, accept: str) -> None:
    status, _, body = await ask(address, get(accept))
    assert status.startswith("200") and b"test_agents 3" in body


async def test_head_has_no_body(address: str) -> None:
    status, headers, body = await ask(address, get(method="HEAD"))
    assert status.startswith("200") and body == b"" and int(headers["content-length"]) > 100


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (get(target="/"), "404"),
        (get(target="/metrics/more"), "404"),
        (get(method="POST"), "405"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "400"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", "400"),
        (b"GET /metrics HTTP/1.1\r\nHost: here\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", "431"),
    ],
)
async def test_wrong_requests(address: str, request_bytes: bytes, status: str) -> None:
    assert (await ask(address, request_bytes))[0].startswith(status)
    assert (await ask(address, get("", target="/metrics?name[]=x")))[0].startswith("200")


async def test_who_says_nothing_is_let_go(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE_SECONDS", 0.05)
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /met")
    assert await reader.read() == b""
    writer.close()


async def test_too_many_at_once(address: str) -> None:
    host, port = address.split(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(16)]
    # Whoever comes first is served first, but all of them count as soon as they are connected.
    status, _, _ = await ask(address, get())
    assert status.startswith("503")
    for _, writer in idle:
        writer.close()

    async def served() -> bool:
        return (await ask(address, get()))[0].startswith("200")

    async with asyncio.timeout(10):
        while not await served():
            await asyncio.sleep(0.01)


async def test_what_cannot_be_collected_is_an_error() -> None:
    async def fail() -> Iterable[Metric]:
        raise RuntimeError("secret")

    server = MetricsServer(fail)
    address = await server.start("127.0.0.1:0")
    status, _, body = await ask(address, get())
    assert status.startswith("500") and b"secret" not in body
    await server.stop()


async def test_stopping_cuts_off_who_waits(address: str) -> None:
    server = MetricsServer(collect)
    other = await server.start("127.0.0.1:0")
    host, port = other.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET")
    await until(lambda: len(server._connections) == 1)
    await server.stop()
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("address", ["", "127.0.0.1:0", "[::1]:9090", "localhost:65535"])
def test_addresses(address: str) -> None:
    check_metrics_listen(address)


@pytest.mark.parametrize("address", ["9090", ":9090", "here:", "here:99999", "unix:/a:1"])
def test_wrong_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="metrics_listen must be"):
        check_metrics_listen(address)


def test_what_every_service_tells(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "test", "")
    before = logs.counts["warning"]
    structlog.get_logger().warning("something")
    families = {family.name: family for family in common("test", True)}
    assert families["samepage_serving"].samples[0].value == 1
    levels = {one.labels["level"]: one.value for one in families["samepage_log_messages"].samples}
    assert levels["warning"] == before + 1
    assert families["process_cpu_seconds"].samples[0].value > 0
    assert families["process_resident_memory_bytes"].samples[0].value > 2**20
    structlog.reset_defaults()


async def test_an_address_that_is_taken(address: str, tmp_path: Path) -> None:
    service = Echo(["127.0.0.1:0"], tmp_path / "ready.json", address)
    with pytest.raises(ListenError, match=f"cannot serve metrics on {address}"):
        await run(service)
    assert service.steps == ["start", "close"]


async def test_a_service_with_metrics(tmp_path: Path) -> None:
    service = Echo(["127.0.0.1:0"], tmp_path / "ready.json", "127.0.0.1:0")
    running = asyncio.create_task(run(service))
    await until((tmp_path / "ready.json").exists)
    address = json.loads((tmp_path / "ready.json").read_text())["metrics"]
    found = await asyncio.to_thread(scrape, address)
    assert found.value("echo_steps") == 1 and found.value("samepage_serving") == 1
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    with pytest.raises(OSError):
        await asyncio.to_thread(scrape, address)
