"""A real Kubernetes of one node: control plane, kubelet and containers, on addresses of its own.

Programs: those of `binaries/` (built once, kept in a folder), and Debian's etcd, containerd, runc
and network plugins. Everything is in one temporary directory and on bridges of its own; nothing
listens elsewhere. Leaving the context ends every process and container, and puts back what
Kubernetes changes of a machine (machine.py).
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import trustme
import yaml
from kube import machine, names
from kube.machine import run

NAME = "node-1"
ADDRESS = "198.18.100.1"
_BRIDGE = "spkube"
_POD_BRIDGE = "spkubepods"
_PODS = "198.18.101.0/24"
_SERVICES = "198.18.102.0/24"
_API = "198.18.102.1"
_PORT = 6443
_GROUPS = {
    "admin": "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    "system:kube-proxy": "",
    "kube-apiserver-kubelet-client": "system:masters",
    f"system:node:{NAME}": "system:nodes",
}
_READY_SECONDS = 180.0
_PAUSE = "localhost/pause:1"


class Node:
    """The node, and `kubectl` for it.

    Args:
        directory: for all its files; not on a tmpfs, since images are unpacked in it.
        binaries: where Kubernetes's programs are.
    """

    def __init__(self, directory: Path, binaries: Path) -> None:
        self.directory = directory
        self._binaries = binaries
        self._ca = trustme.CA()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._resources = contextlib.ExitStack()
        self._etcd = f"http://127.0.0.1:{_free_port()}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self._kubeconfig("admin")

    def kubectl(self, *arguments: str | Path, text: str | None = None) -> str:
        """Run kubectl as the administrator; return what it printed."""
        return run(self._program("kubectl"), "--kubeconfig", self.kubeconfig, *arguments, text=text)

    def ctr(self, *arguments: str | Path) -> str:
        """Run containerd's own command on the containers of Kubernetes."""
        address = self.directory / "containerd.sock"
        return run("ctr", "--address", address, "--namespace", "k8s.io", *arguments)

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: it is not after three minutes.
        """
        deadline = time.monotonic() + _READY_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not so after {_READY_SECONDS:.0f} s")
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended:\n{self._log(name)}")
            time.sleep(0.2)

    def restart_kubelet(self) -> None:
        """End the kubelet, and start it again; its pods go on."""
        self._end("kubelet")
        self._start_kubelet()
        self.until("the node is ready again", self._is_ready)

    def __enter__(self) -> Self:
        try:
            self._resources.enter_context(machine.kept())
            self._resources.callback(self._clean)
            self._make_network()
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
        self._write_certificates()
        self._start_containerd()
        self._start_etcd()
        self._start_apiserver()
        self._start_controllers()
        self._start_proxy()
        self._start_kubelet()
        self.until("the node is ready", self._is_ready)
        server = names.serve(ADDRESS, self.kubectl)
        self._resources.callback(server.stop)

    def _clean(self) -> None:
        for name in ("kubelet", "scheduler", "controller-manager", "apiserver", "etcd", "proxy"):
            self._end(name)
        if "containerd" in self._processes:
            self._end_containers()
            self._end("containerd")
        machine.unmount_below(self.directory)
        machine.remove_namespaces("cni-")
        for link in (_POD_BRIDGE, _BRIDGE):
            machine.remove_link(link)

    def _end_containers(self) -> None:
        tasks = self.ctr("task", "ls", "-q").split()
        for task in tasks:
            with contextlib.suppress(RuntimeError):
                self.ctr("task", "rm", "--force", task)

    def _make_network(self) -> None:
        run("ip", "link", "add", _BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{ADDRESS}/24", "dev", _BRIDGE)
        run("ip", "link", "set", _BRIDGE, "up")
        plugins = [
            {
                "type": "bridge",
                "bridge": _POD_BRIDGE,
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(self.directory / "ipam"),
                    "ranges": [[{"subnet": _PODS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        network = {"cniVersion": "0.4.0", "name": "samepage", "plugins": plugins}
        self._write("cni/10-samepage.conflist", json.dumps(network))

    def _write_certificates(self) -> None:
        self._write("ca.crt", self._ca.cert_pem.bytes().decode())
        server = (ADDRESS, _API, "127.0.0.1", NAME, "kubernetes.default.svc", "kubernetes.default")
        self._issue("server", *server)
        for name, group in _GROUPS.items():
            self._issue(name, f"{name.replace(':', '-')}.test", name=name, group=group)
            self._write(f"{name}.kubeconfig", yaml.safe_dump(self._access(name)))

    def _issue(self, file: str, *hosts: str, name: str = "", group: str = "") -> None:
        issued = self._ca.issue_cert(
            *hosts, common_name=name or None, organization_name=group or None
        )
        self._write(f"{file}.crt", "".join(p.bytes().decode() for p in issued.cert_chain_pems))
        self._write(f"{file}.key", issued.private_key_pem.bytes().decode())

    def _access(self, name: str) -> dict[str, object]:
        cluster = {
            "server": f"https://{ADDRESS}:{_PORT}",
            "certificate-authority": str(self.directory / "ca.crt"),
        }
        user = {
            "client-certificate": str(self.directory / f"{name}.crt"),
            "client-key": str(self.directory / f"{name}.key"),
        }
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }

    def _start_containerd(self) -> None:
        self._write("containerd.toml", _CONTAINERD.format(directory=self.directory))
        self._spawn("containerd", "containerd", "--config", self.directory / "containerd.toml")
        self.until("containerd answers", lambda: (self.directory / "containerd.sock").exists())
        self.ctr("image", "import", _pause_image(self.directory))

    def _start_etcd(self) -> None:
        peer = f"http://127.0.0.1:{_free_port()}"
        self._spawn(
            "etcd",
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )

    def _start_apiserver(self) -> None:
        at = self.directory
        self._spawn(
            "apiserver",
            self._program("kube-apiserver"),
            f"--etcd-servers={self._etcd}",
            f"--bind-address={ADDRESS}",
            f"--advertise-address={ADDRESS}",
            f"--secure-port={_PORT}",
            f"--service-cluster-ip-range={_SERVICES}",
            f"--client-ca-file={at / 'ca.crt'}",
            f"--tls-cert-file={at / 'server.crt'}",
            f"--tls-private-key-file={at / 'server.key'}",
            f"--kubelet-client-certificate={at / 'kube-apiserver-kubelet-client.crt'}",
            f"--kubelet-client-key={at / 'kube-apiserver-kubelet-client.key'}",
            f"--kubelet-certificate-authority={at / 'ca.crt'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={at / 'server.key'}",
            f"--service-account-signing-key-file={at / 'server.key'}",
            "--authorization-mode=Node,RBAC",
        )
        self.until("the API server is ready", self._answers)

    def _start_controllers(self) -> None:
        manager, scheduler = "system:kube-controller-manager", "system:kube-scheduler"
        self._spawn(
            "controller-manager",
            self._program("kube-controller-manager"),
            f"--kubeconfig={self._kubeconfig(manager)}",
            f"--root-ca-file={self.directory / 'ca.crt'}",
            f"--service-account-private-key-file={self.directory / 'server.key'}",
            f"--bind-address={ADDRESS}",
            "--use-service-account-credentials",
            "--leader-elect=false",
        )
        self._spawn(
            "scheduler",
            self._program("kube-scheduler"),
            f"--kubeconfig={self._kubeconfig(scheduler)}",
            f"--bind-address={ADDRESS}",
            "--leader-elect=false",
        )

    def _start_proxy(self) -> None:
        self._spawn(
            "proxy",
            self._program("kube-proxy"),
            f"--kubeconfig={self._kubeconfig('system:kube-proxy')}",
            f"--hostname-override={NAME}",
            f"--cluster-cidr={_PODS}",
            f"--bind-address={ADDRESS}",
            f"--healthz-bind-address={ADDRESS}:10256",
            f"--metrics-bind-address={ADDRESS}:10249",
            f"--nodeport-addresses={ADDRESS}/32",
            "--proxy-mode=iptables",
            "--masquerade-all",
        )

    def _start_kubelet(self) -> None:
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": ADDRESS,
            "healthzBindAddress": ADDRESS,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.directory / "ca.crt")},
            },
            "cgroupDriver": "cgroupfs",
            "clusterDNS": [ADDRESS],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint": f"unix://{self.directory / 'containerd.sock'}",
            "evictionHard": {"memory.available": "50Mi"},
            "failCgroupV1": False,
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,
            "nodeStatusUpdateFrequency": "1s",
            "oomScoreAdj": 0,
            "resolvConf": "",
            "tlsCertFile": str(self.directory / "server.crt"),
            "tlsPrivateKeyFile": str(self.directory / "server.key"),
        }
        self._write("kubelet.yaml", yaml.safe_dump(settings))
        self._spawn(
            "kubelet",
            self._program("kubelet"),
            f"--config={self.directory / 'kubelet.yaml'}",
            f"--kubeconfig={self._kubeconfig(f'system:node:{NAME}')}",
            f"--hostname-override={NAME}",
            f"--node-ip={ADDRESS}",
            f"--root-dir={self.directory / 'kubelet'}",
        )

    def _answers(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return self.kubectl("get", "--raw", "/readyz") == "ok"
        return False

    def _is_ready(self) -> bool:
        conditions = "{range .items[*]}{range .status.conditions[?(@.type=='Ready')]}{.status}"
        path = f"jsonpath={conditions}{{end}}{{end}}"
        return self.kubectl("get", "nodes", "-o", path) == "True"

    def _kubeconfig(self, name: str) -> Path:
        return self.directory / f"{name}.kubeconfig"

    def _program(self, name: str) -> Path:
        return self._binaries / name

    def _write(self, name: str, text: str) -> None:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(text)

    def _log(self, name: str) -> str:
        return "\n".join((self.directory / f"{name}.log").read_text().splitlines()[-20:])

    def _spawn(self, name: str, *command: str | Path) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the tests alone, which end it in order
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


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
