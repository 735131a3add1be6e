"""A kubelet, as far as a device plugin can tell: registration, watching, allocation."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc

from samepage.kubelet import device_plugin_pb2, device_plugin_pb2_grpc


class FakeKubelet(device_plugin_pb2_grpc.RegistrationServicer):
    """Serves v1beta1.Registration on kubelet.sock, and watches the plugins that register.

    Attributes:
        requests: the registrations so far, newest last.
        devices: what the newest plugin has said of each device, by its id.
        refusal: with a text, registrations are refused with it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None
        self._watch: asyncio.Task[None] | None = None
        self.requests: list[device_plugin_pb2.RegisterRequest] = []
        self.devices: dict[str, str] = {}
        self.refusal = ""

    async def start(self) -> None:
        """Delete all sockets, as a kubelet does that starts, and serve."""
        for socket in self._directory.iterdir():
            socket.unlink()
        self.requests = []
        self.devices = {}
        self._server = grpc.aio.server()
        device_plugin_pb2_grpc.add_RegistrationServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self._directory}/kubelet.sock")
        await self._server.start()

    async def stop(self) -> None:
        """End as by kill -9: the socket stays."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        if self._channel is not None:
            await self._channel.close()
        if self._server is not None:
            await self._server.stop(None)

    async def Register(
        self,
        request: device_plugin_pb2.RegisterRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> device_plugin_pb2.Empty:
        if self.refusal:
            await context.abort(grpc.StatusCode.UNKNOWN, self.refusal)
        self.requests.append(request)
        self._channel = grpc.aio.insecure_channel(f"unix:{self._directory}/{request.endpoint}")
        self._watch = asyncio.create_task(self._follow(self.plugin))
        return device_plugin_pb2.Empty()

    @property
    def plugin(self) -> device_plugin_pb2_grpc.DevicePluginAsyncStub:
        """The plugin that registered last."""
        assert self._channel is not None
        return device_plugin_pb2_grpc.DevicePluginStub(self._channel)

    async def allocate(self, *containers: list[str]) -> device_plugin_pb2.AllocateResponse:
        """Ask for devices, as for a pod of such containers."""
        return await self.plugin.Allocate(
            device_plugin_pb2.AllocateRequest(
                container_requests=[
                    device_plugin_pb2.ContainerAllocateRequest(devicesIDs=ids) for ids in containers
                ]
            )
        )

    async def _follow(self, plugin: device_plugin_pb2_grpc.DevicePluginAsyncStub) -> None:
        try:
            async for answer in plugin.ListAndWatch(device_plugin_pb2.Empty()):
                self.devices = {device.ID: device.health for device in answer.devices}
        except grpc.aio.AioRpcError:
            # The plugin ended; its devices count no more.
            self.devices = {}
