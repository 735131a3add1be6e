"""A node of the cluster: containerd, kubelet and proxy, and the network of its pods."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml
from kube import machine
from kube.authority import Authority
from kube.machine import run
from kube.processes import Processes, Until

PODS = "198.18.101.0/24"
SERVICES = "198.18.102.0/24"
API = "198.18.102.1"
DNS = "198.18.100.1"
_POD_BRIDGE = "spkubepods"
_PAUSE = "localhost/pause:1"


@dataclass(frozen=True)
class Place:
    """Where a node is.

    Attributes:
        pods: the addresses of its pods, a part of PODS.
        apart: whether it has a network and folders of its own, on the same kernel.
    """

    name: str
    address: str
    pods: str
    apart: bool = False


class Node:
    """A context manager; leaving it ends every container of the node.

    Args:
        directory: for all its files.
        binaries: where Kubernetes's programs are.
        until: waits until something is so.
    """

    def __init__(
        self, directory: Path, binaries: Path, authority: Authority, place: Place, until: Until
    ) -> None:
        directory.mkdir()
        self.name = place.name
        self._directory = directory
        self._binaries = binaries
        self._authority = authority
        self._place = place
        self._until = until
        self._socket = directory / "containerd.sock"
        self._processes = Processes(directory)
        self._resources = contextlib.ExitStack()

    def ctr(self, *arguments: str | Path) -> str:
        """Run containerd's own command on the containers of Kubernetes."""
        return run("ctr", "--address", self._socket, "--namespace", "k8s.io", *arguments)

    def load(self, archive: Path) -> None:
        """Give the node an image."""
        self.ctr("image", "import", archive)

    def restart_kubelet(self) -> None:
        """End the kubelet, and start it again; its pods go on."""
        self._processes.end("kubelet")
        self._start_kubelet()

    def check(self) -> None:
        """Raise RuntimeError when one of its programs has ended."""
        self._processes.check()

    def __enter__(self) -> Self:
        try:
            self._start()
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

    def _start(self) -> None:
        if self._place.apart:
            apart = machine.apart(self._place.address, self._place.pods, DNS)
            enter = self._resources.enter_context(apart)
            self._processes = Processes(self._directory, enter)
        else:
            self._resources.enter_context(machine.pod_network(_POD_BRIDGE))
        self._resources.enter_context(machine.cgroup(self._cgroup))
        self._resources.callback(machine.unmount_below, self._directory)
        self._resources.callback(self._end)
        name, address = self._place.name, self._place.address
        self._user = self._authority.admit(f"system:node:{name}", "system:nodes")
        self._certificate, self._key = self._authority.issue(name, name, address)
        self._write_network()
        self._start_containerd()
        self._start_proxy()
        self._start_kubelet()

    def _end(self) -> None:
        self._processes.end("kubelet")
        self._processes.end("proxy")
        if "containerd" in self._processes:
            for task in self.ctr("task", "ls", "-q").split():
                with contextlib.suppress(RuntimeError):
                    self.ctr("task", "rm", "--force", task)
        self._processes.end_all()

    @property
    def _cgroup(self) -> str:
        return f"samepage-{self._place.name}"

    def _write_network(self) -> None:
        plugins = [
            {
                "type": "bridge",
                "bridge": _POD_BRIDGE,
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(self._directory / "ipam"),
                    "ranges": [[{"subnet": self._place.pods}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        network = {"cniVersion": "0.4.0", "name": "samepage", "plugins": plugins}
        self._write("cni/10-samepage.conflist", json.dumps(network))

    def _start_containerd(self) -> None:
        file = self._write("containerd.toml", _CONTAINERD.format(directory=self._directory))
        self._processes.start("containerd", "containerd", "--config", file)
        self._until("containerd answers", self._socket.exists)
        self.load(_pause_image(self._directory))

    def _start_proxy(self) -> None:
        user = self._authority.admit("system:kube-proxy")
        address = self._place.address
        self._processes.start(
            "proxy",
            self._binaries / "kube-proxy",
            f"--kubeconfig={user}",
            f"--hostname-override={self._place.name}",
            f"--cluster-cidr={PODS}",
            f"--bind-address={address}",
            f"--healthz-bind-address={address}:10256",
            f"--metrics-bind-address={address}:10249",
            f"--nodeport-addresses={address}/32",
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
            "--proxy-mode=iptables",
            "--masquerade-all",
        )

    def _start_kubelet(self) -> None:
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self._place.address,
            "healthzBindAddress": self._place.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._authority.certificate)},
            },
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "clusterDNS": [DNS],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "evictionHard": {"memory.available": "50Mi"},
            "failCgroupV1": False,
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,
            "nodeStatusUpdateFrequency": "1s",
            "oomScoreAdj": 0,
            "resolvConf": "",
            "tlsCertFile": str(self._certificate),
            "tlsPrivateKeyFile": str(self._key),
        }
        self._processes.start(
            "kubelet",
            self._binaries / "kubelet",
            f"--config={self._write('kubelet.yaml', yaml.safe_dump(settings))}",
            f"--kubeconfig={self._user}",
            f"--hostname-override={self._place.name}",
            f"--node-ip={self._place.address}",
            f"--root-dir={self._directory / 'kubelet'}",
        )

    def _write(self, name: str, text: str) -> Path:
        file = self._directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file


_CONTAINERD = """
version = 2
root = "{directory}/containerd"
state = "{directory}/containerd-state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs"]
[grpc]
  address = "{directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""


def _pause_image(directory: Path) -> Path:
    """Make the image of the container that every pod has, which only waits."""
    root = directory / "pause"
    root.mkdir()
    source = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
    run("gcc", "-static", "-O2", "-x", "c", "-", "-o", root / "pause", text=source)
    image = directory / "pause.tar"
    container = run("buildah", "from", "scratch").strip()
    try:
        run("buildah", "copy", container, root / "pause", "/pause")
        run("buildah", "config", "--entrypoint", '["/pause"]', container)
        run("buildah", "commit", container, f"docker-archive:{image}:{_PAUSE}")
    finally:
        run("buildah", "rm", container)
    return image
