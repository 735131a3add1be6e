"""Pods by podman: real containers, as a kubelet runs them, without a control plane."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from kube import machine
from kube.machine import run

GATEWAY = "198.18.110.1"
_SUBNET = "198.18.110.0/24"
_NETWORK = "samepage-pods"
_RUNTIME = Path(__file__).with_name("runtime.py")
_SETTINGS = """
[containers]
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "samepage"
[engine.runtimes]
samepage = ["{runtime}"]
[network]
network_backend = "netavark"
"""


class Podman:
    """A context manager; leaving it ends every pod, and puts the machine back.

    Args:
        directory: for its settings.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pods: dict[str, list[str]] = {}
        self._resources = contextlib.ExitStack()

    def play(self, pod: dict[str, Any], address: str = "") -> None:
        """Start a pod, at an address of `GATEWAY`'s network.

        Raises:
            RuntimeError: a container did not start; podman's text says why.
        """
        name = pod["metadata"]["name"]
        self._pods[name] = [container["name"] for container in pod["spec"]["containers"]]
        network = f"{_NETWORK}:ip={address}" if address else _NETWORK
        self._podman("kube", "play", "--network", network, "-", text=yaml.safe_dump(pod))

    def remove(self, name: str, seconds: int = 20) -> None:
        """End a pod as a kubelet does: ask its processes to end, and kill them some time later."""
        del self._pods[name]
        self._podman("pod", "rm", "--force", "--time", str(seconds), name)

    def logs(self, name: str) -> str:
        """What a pod's only container has printed, errors last."""
        names = ("podman", "logs", self._only(name))
        done = subprocess.run(names, capture_output=True, text=True, env=self._environment)
        return done.stdout + done.stderr

    def last_line(self, name: str) -> str:
        """The last line of that, with its time."""
        return self._podman("logs", "--tail", "1", "--timestamps", self._only(name))

    def execute(self, name: str, container: str, *command: str) -> str:
        """Run a command in a container."""
        return self._podman("exec", f"{name}-{container}", *command)

    def processes(self, name: str) -> list[int]:
        """The processes of a pod's containers, but for those that they started."""
        return [state["Pid"] for state in self._states(name)]

    def ended(self, name: str) -> int | None:
        """The exit code of a pod's only container; None while it runs."""
        (state,) = self._states(name)
        code: int = state["ExitCode"]
        return None if state["Running"] else code

    def __enter__(self) -> Self:
        settings = self._directory / "containers.conf"
        runtime = self._directory / "runtime"
        runtime.write_text(f"#!{sys.executable}\n{_RUNTIME.read_text()}")
        runtime.chmod(0o755)
        settings.write_text(_SETTINGS.format(runtime=runtime))
        self._environment = os.environ | {"CONTAINERS_CONF": str(settings)}
        try:
            self._resources.enter_context(machine.kept())
            self._resources.enter_context(machine.cgroup("libpod_parent"))
            # With the pods of a run that was killed.
            self._podman("network", "rm", "--force", _NETWORK, check=False)
            self._podman("network", "create", "--subnet", _SUBNET, _NETWORK)
            self._resources.callback(self._podman, "network", "rm", "--force", _NETWORK)
            # So that something can listen there before there are pods.
            link = self._podman("network", "inspect", "--format={{.NetworkInterface}}", _NETWORK)
            self._resources.enter_context(machine.bridge(GATEWAY, link.strip()))
            self._resources.callback(self._end)
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    def _end(self) -> None:
        for name in self._pods:
            self._podman("pod", "rm", "--force", "--ignore", "--time", "0", name)

    def _only(self, name: str) -> str:
        (container,) = self._pods[name]
        return f"{name}-{container}"

    def _states(self, name: str) -> list[dict[str, Any]]:
        names = [f"{name}-{container}" for container in self._pods[name]]
        found = json.loads(self._podman("container", "inspect", *names))
        return [container["State"] for container in found]

    def _podman(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        return run("podman", *arguments, text=text, check=check, environment=self._environment)
