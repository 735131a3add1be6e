"""The device plugin, as a process of its own, with a kubelet that comes, goes and refuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from fakes.fake_kubelet import FakeKubelet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.scrape import scrape
from helpers.waiting import until

from samepage.daemon.config import ConfigError
from samepage_kubernetes.device_plugin.config import Config

SERVING = health_pb2.HealthCheckResponse.SERVING
IDS = [f"userfaultfd-{number}" for number in range(3)]


class Node:
    """The directories of a node: what the kubelet has, and a /dev."""

    def __init__(self, tmp_path: Path) -> None:
        self.kubelet_dir = tmp_path / "plugins"
        self.kubelet_dir.mkdir()
        self.device = tmp_path / "userfaultfd"
        self.log = tmp_path / "log"
        self.ready_file = tmp_path / "ready.json"
        self.kubelet = FakeKubelet(self.kubelet_dir)

    def plug(self) -> None:
        # What matters is a character device; making one of its own takes a privilege.
        self.device.symlink_to("/dev/null")

    def unplug(self) -> None:
        self.device.unlink()

    def ready(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.ready_file.read_text())
        return found

    def all_are(self, health: str) -> bool:
        return self.kubelet.devices == dict.fromkeys(IDS, health)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    yield node
    await node.kubelet.stop()


@asynccontextmanager
async def plugin(node: Node) -> AsyncIterator[asyncio.subprocess.Process]:
    settings = {
        "KUBELET_DIR": str(node.kubelet_dir),
        "DEVICE_SEEN": str(node.device),
        "COUNT": str(len(IDS)),
        "CHECK_SECONDS": "0.02",
        "METRICS_LISTEN": "127.0.0.1:0",
        "READY_FILE": str(node.ready_file),
    }
    env = {
        **os.environ,
        **{f"SAMEPAGE_DEVICE_PLUGIN_{name}": value for name, value in settings.items()},
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with node.log.open("w") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "samepage_kubernetes.device_plugin", env=env, stderr=log
        )
    try:
        await until(node.ready_file.exists)
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0, node.log.read_text()


async def test_registers_and_gives_the_device(node: Node) -> None:
    node.plug()
    await node.kubelet.start()
    async with plugin(node):
        await until(lambda: node.all_are("Healthy"))
        [request] = node.kubelet.requests
        assert request.version == "v1beta1"
        assert request.resource_name == "samepage.io/userfaultfd"
        assert request.endpoint == "samepage.io-userfaultfd.sock"
        socket = (node.kubelet_dir / request.endpoint).stat()
        assert stat.S_IMODE(socket.st_mode) == 0o600
        answer = await node.kubelet.allocate([IDS[0]], [IDS[2]])
        for container in answer.container_responses:
            [device] = container.devices
            assert device.host_path == device.container_path == "/dev/userfaultfd"
            assert device.permissions == "rw"
            assert not container.mounts and not container.envs
        with pytest.raises(grpc.aio.AioRpcError, match="this plugin has no other-1"):
            await node.kubelet.allocate(["other-1"])
        metrics = scrape(node.ready()["metrics"])
        assert metrics.value("samepage_device_plugin_device") == 1
        assert metrics.value("samepage_device_plugin_allocations_total") == 2
    # Gone with its plugin, so that the kubelet sees its end.
    assert not (node.kubelet_dir / request.endpoint).exists()


async def test_survives_restarts_of_the_kubelet(node: Node) -> None:
    node.plug()
    await node.kubelet.start()
    async with plugin(node):
        await until(lambda: node.all_are("Healthy"))
        for _ in range(3):
            await node.kubelet.stop()
            await node.kubelet.start()
            await until(lambda: node.all_are("Healthy"))
            assert len(node.kubelet.requests) == 1
            await node.kubelet.allocate([IDS[1]])
        metrics = scrape(node.ready()["metrics"])
        assert metrics.value("samepage_device_plugin_registrations_total") == 4


async def test_a_kubelet_that_only_deletes_the_socket_of_the_plugin(node: Node) -> None:
    node.plug()
    await node.kubelet.start()
    async with plugin(node):
        await until(lambda: node.all_are("Healthy"))
        (node.kubelet_dir / "samepage.io-userfaultfd.sock").unlink()
        await until(lambda: len(node.kubelet.requests) == 2)
        await until(lambda: node.all_are("Healthy"))


async def test_waits_for_a_kubelet_and_says_so(node: Node) -> None:
    node.plug()
    async with plugin(node), grpc.aio.insecure_channel(node.ready()["address"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        assert (await watch.read()).status != SERVING
        await until(lambda: "kubelet.sock is not there" in node.log.read_text())
        await node.kubelet.start()
        assert (await watch.read()).status == SERVING
        watch.cancel()


async def test_a_kubelet_that_refuses_is_asked_again(node: Node) -> None:
    node.plug()
    await node.kubelet.start()
    node.kubelet.refusal = "no plugins today"
    async with plugin(node):
        await until(lambda: "did not take the plugin: no plugins today" in node.log.read_text())
        node.kubelet.refusal = ""
        await until(lambda: node.all_are("Healthy"))


async def test_a_node_without_the_device(node: Node) -> None:
    await node.kubelet.start()
    async with plugin(node):
        await until(lambda: node.all_are("Unhealthy"))
        assert "no container gets it on this node" in node.log.read_text()
        with pytest.raises(grpc.aio.AioRpcError, match="kernel has no userfaultfd"):
            await node.kubelet.allocate([IDS[0]])
        node.plug()
        await until(lambda: node.all_are("Healthy"))
        node.unplug()
        await until(lambda: node.all_are("Unhealthy"))
        # What is there must be a device.
        node.device.write_text("")
        with pytest.raises(grpc.aio.AioRpcError, match="kernel has no userfaultfd"):
            await node.kubelet.allocate([IDS[0]])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"resource": "userfaultfd"}, "resource must be a domain, a slash and a name"),
        ({"device": Path("userfaultfd")}, "device must be an absolute path"),
        ({"count": 0}, "count must be 1 to 1000"),
        ({"check_seconds": 0.0}, "check_seconds must be more than 0"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Config(**setting)  # type: ignore[arg-type]
