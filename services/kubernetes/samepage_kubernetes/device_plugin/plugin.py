"""The plugin as the kubelet sees it: which devices there are, and what a container gets."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import structlog

from samepage.kubelet import device_plugin_pb2, device_plugin_pb2_grpc

HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Plugin(device_plugin_pb2_grpc.DevicePluginServicer):
    """Serves v1beta1.DevicePlugin: one device, as often as configured.

    Args:
        device: its path on the node, and in the container.
        seen: where this process sees it.
        count: how many containers may have it.
    """

    def __init__(self, device: Path, seen: Path, count: int) -> None:
        self._device = device
        self._seen = seen
        self._ids = [f"{device.name}-{number}" for number in range(count)]
        self._changed = asyncio.Event()
        self.healthy = is_device(seen)
        self.allocations = 0
        if not self.healthy:
            self._warn()

    def look(self) -> None:
        """See whether the device is there, and tell the kubelet when that has changed."""
        healthy = is_device(self._seen)
        if healthy == self.healthy:
            return
        self.healthy = healthy
        if healthy:
            log.info("the device is there", device=str(self._seen))
        else:
            self._warn()
        self._changed.set()
        self._changed = asyncio.Event()

    async def GetDevicePluginOptions(
        self, request: device_plugin_pb2.Empty, context: Context
    ) -> device_plugin_pb2.DevicePluginOptions:
        """None of the optional calls."""
        return device_plugin_pb2.DevicePluginOptions()

    async def ListAndWatch(
        self, request: device_plugin_pb2.Empty, context: Context
    ) -> AsyncIterator[device_plugin_pb2.ListAndWatchResponse]:
        """All devices, now and whenever their health changes."""
        while True:
            changed = self._changed
            health = HEALTHY if self.healthy else UNHEALTHY
            yield device_plugin_pb2.ListAndWatchResponse(
                devices=[device_plugin_pb2.Device(ID=name, health=health) for name in self._ids]
            )
            await changed.wait()

    async def Allocate(
        self, request: device_plugin_pb2.AllocateRequest, context: Context
    ) -> device_plugin_pb2.AllocateResponse:
        """The device, for each container once; NOT_FOUND for devices that are not this plugin's."""
        containers = request.container_requests
        wanted = {name for container in containers for name in container.devicesIDs}
        if unknown := wanted.difference(self._ids):
            text = f"this plugin has no {', '.join(sorted(unknown))}"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        if not is_device(self._seen):
            text = f"{self._seen} is not there: the node's kernel has no userfaultfd"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        self.allocations += len(containers)
        log.info("given to containers", device=str(self._device), containers=len(containers))
        return device_plugin_pb2.AllocateResponse(
            container_responses=[self._container() for _ in containers]
        )

    async def GetPreferredAllocation(
        self, request: device_plugin_pb2.PreferredAllocationRequest, context: Context
    ) -> device_plugin_pb2.PreferredAllocationResponse:
        """Not offered: all devices are the same one."""
        return await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not offered")

    async def PreStartContainer(
        self, request: device_plugin_pb2.PreStartContainerRequest, context: Context
    ) -> device_plugin_pb2.PreStartContainerResponse:
        """Not offered: there is nothing to do."""
        return await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not offered")

    def _container(self) -> device_plugin_pb2.ContainerAllocateResponse:
        path = str(self._device)
        device = device_plugin_pb2.DeviceSpec(container_path=path, host_path=path, permissions="rw")
        return device_plugin_pb2.ContainerAllocateResponse(devices=[device])

    def _warn(self) -> None:
        log.warning(
            "the device is not there: no container gets it on this node. It takes Linux 6.1 or"
            " later with CONFIG_USERFAULTFD",
            device=str(self._seen),
        )


def is_device(path: Path) -> bool:
    """Whether there is a character device."""
    try:
        return stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False
