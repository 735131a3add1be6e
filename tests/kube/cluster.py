"""A real Kubernetes on this machine: a control plane, and nodes on addresses of their own.

Programs: those of `binaries/` (built once, kept in a folder), and Debian's etcd, containerd, runc
and network plugins. Everything is in one temporary directory and on bridges of its own; nothing
listens elsewhere. Leaving the context ends every process and container, and puts back what
Kubernetes changes of a machine (machine.py).
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from kube import machine, names, processes
from kube.authority import Authority
from kube.machine import run
from kube.node import API, SERVICES, Node, Place
from kube.processes import Processes

_PORT = 6443
_FIRST = Place("node-1", "198.18.100.1", "198.18.101.0/25")
_SECOND = Place("node-2", "198.18.100.2", "198.18.101.128/25", apart=True)


class Cluster:
    """The control plane and its nodes, and `kubectl`.

    Args:
        directory: for all its files; not on a tmpfs, since images are unpacked in it.
        binaries: where Kubernetes's programs are.
    """

    def __init__(self, directory: Path, binaries: Path) -> None:
        self.directory = directory
        self.nodes: list[Node] = []
        self._images: list[Path] = []
        self._binaries = binaries
        self._authority = Authority(directory, f"https://{_FIRST.address}:{_PORT}")
        self._processes = Processes(directory)
        self._resources = contextlib.ExitStack()
        self._etcd = f"http://127.0.0.1:{_free_port()}"
        self.kubeconfig = self._authority.admit("admin", "system:masters")

    def kubectl(self, *arguments: str | Path, text: str | None = None) -> str:
        """Run kubectl as the administrator; return what it printed."""
        program = self._binaries / "kubectl"
        return run(program, "--kubeconfig", self.kubeconfig, *arguments, text=text)

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: it is not after three minutes.
        """
        processes.until(what, condition, self._check)

    def load(self, image: str) -> None:
        """Bring an image from buildah's storage to all nodes, also those that join later."""
        archive = self.directory / f"image-{len(self._images)}.tar"
        run("buildah", "push", "--quiet", image, f"docker-archive:{archive}:{image}")
        self._images.append(archive)
        for node in self.nodes:
            node.load(archive)

    def join(self) -> Node:
        """Add a second node, which has the machine's kernel and nothing else in common with the
        first, and wait until it is ready. Only DaemonSets and who names it run there."""
        node = self._add(_SECOND)
        for archive in self._images:
            node.load(archive)
        self.kubectl("cordon", _SECOND.name)
        return node

    def restart_kubelet(self) -> None:
        """End the first node's kubelet, start it again, and wait until it knows its pods."""
        first = self.nodes[0]
        first.restart_kubelet()
        self.until("the kubelet knows its pods again", lambda: bool(self._pods_of(first)))

    def __enter__(self) -> Self:
        try:
            self._resources.enter_context(machine.kept())
            self._resources.enter_context(machine.bridge(_FIRST.address))
            self._resources.callback(self._processes.end_all)
            self._start_etcd()
            self._start_apiserver()
            self._start_controllers()
            self._add(_FIRST)
            server = names.serve(_FIRST.address, self.kubectl)
            self._resources.callback(server.stop)
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

    def _add(self, place: Place) -> Node:
        node = Node(self.directory / place.name, self._binaries, self._authority, place, self.until)
        self.nodes.append(self._resources.enter_context(node))
        self.until("the nodes are ready", self._is_ready)
        return node

    def _check(self) -> None:
        self._processes.check()
        for node in self.nodes:
            node.check()

    def _start_etcd(self) -> None:
        peer = f"http://127.0.0.1:{_free_port()}"
        self._processes.start(
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
        hosts = (_FIRST.address, API, "127.0.0.1", "kubernetes.default.svc", "kubernetes.default")
        certificate, self._key = self._authority.issue("server", *hosts)
        client, key = self._authority.issue(
            "kubelet-client", "kubelet-client.test", name="kubelet-client", group="system:masters"
        )
        self._processes.start(
            "apiserver",
            self._binaries / "kube-apiserver",
            f"--etcd-servers={self._etcd}",
            f"--bind-address={_FIRST.address}",
            f"--advertise-address={_FIRST.address}",
            f"--secure-port={_PORT}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--client-ca-file={self._authority.certificate}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={self._key}",
            f"--kubelet-client-certificate={client}",
            f"--kubelet-client-key={key}",
            f"--kubelet-certificate-authority={self._authority.certificate}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self._key}",
            f"--service-account-signing-key-file={self._key}",
            "--authorization-mode=Node,RBAC",
        )
        self.until("the API server is ready", self._answers)

    def _start_controllers(self) -> None:
        for name, *flags in (
            (
                "controller-manager",
                f"--root-ca-file={self._authority.certificate}",
                f"--service-account-private-key-file={self._key}",
                "--use-service-account-credentials",
            ),
            ("scheduler",),
        ):
            self._processes.start(
                name,
                self._binaries / f"kube-{name}",
                f"--kubeconfig={self._authority.admit(f'system:kube-{name}')}",
                f"--bind-address={_FIRST.address}",
                "--leader-elect=false",
                *flags,
            )

    def _answers(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return self.kubectl("get", "--raw", "/readyz") == "ok"
        return False

    def _pods_of(self, node: Node) -> list[object]:
        with contextlib.suppress(RuntimeError):
            listed = self.kubectl("get", "--raw", f"/api/v1/nodes/{node.name}/proxy/pods")
            items: list[object] = json.loads(listed)["items"] or []
            return items
        return []

    def _is_ready(self) -> bool:
        conditions = "{range .items[*]}{range .status.conditions[?(@.type=='Ready')]}{.status}"
        path = f"jsonpath={conditions}{{end}}{{end}}"
        return self.kubectl("get", "nodes", "-o", path) == "True" * len(self.nodes)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
