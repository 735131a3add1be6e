"""The chart on a real Kubernetes: installed, used, rolled, upgraded, removed under a running job.

The tests are one story and run in order: each begins where the one before ended.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from kube.machine import run
from kube.node import Node

from samepage.daemon.roles import Role

ROOT = Path(__file__).parents[2]
NAMESPACE = "samepage"
VERSION = "0.1.0"
REPLICAS = 4
TABLE_BYTES = 64 << 20
AGENT = "app.kubernetes.io/component=agent"
IMAGES = ("scanner", "merger", "index", "kubernetes")

pytestmark = [pytest.mark.needs("root", "userfaultfd"), pytest.mark.timeout(1200)]


class Chart:
    """Helm, and what it has installed."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def helm(self, *arguments: str) -> str:
        """Run helm in the chart's namespace."""
        helm = os.environ["SAMEPAGE_HELM"]
        place = ("--kubeconfig", str(self._node.kubeconfig), "--namespace", NAMESPACE)
        return run(helm, *place, *arguments)

    def install(self, command: str, *settings: str) -> None:
        """Install or upgrade it with all hardening, and wait until all of it runs."""
        roles = {f"tls.existingSecrets.{role}": f"tls-{role}" for role in _ROLES}
        values = {"recommendations.enabled": "true", "tls.mode": "existingSecrets", **roles}
        sets = [f"--set={name}={value}" for name, value in values.items()]
        extra = [f"--set={setting}" for setting in settings]
        self.helm(command, "samepage", str(ROOT / "deploy/helm/samepage"), *sets, *extra)
        self.rolled_out()

    def rolled_out(self) -> None:
        """Wait until the new version runs everywhere."""
        for kind in ("daemonset/samepage-agent", "deployment/samepage-index"):
            self._node.kubectl("-n", NAMESPACE, "rollout", "status", kind, "--timeout=240s")


_ROLES = (Role.SCANNER, Role.MERGER, Role.INDEX)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("node")
    with Node(directory, Path(os.environ["SAMEPAGE_KUBE_BINARIES"])) as node:
        for image in IMAGES:
            load(node, f"localhost/samepage-{image}:{VERSION}")
        yield node


@pytest.fixture(scope="module")
def chart(node: Node) -> Chart:
    return Chart(node)


def load(node: Node, image: str) -> None:
    """Bring an image from buildah's storage to the node's."""
    archive = node.directory / "image.tar"
    run("buildah", "push", "--quiet", image, f"docker-archive:{archive}:{image}")
    node.ctr("image", "import", archive)
    archive.unlink()


def pods(node: Node, label: str, namespace: str = "default") -> list[dict[str, Any]]:
    listed = node.kubectl("-n", namespace, "get", "pods", "-l", label, "-o", "json")
    items: list[dict[str, Any]] = json.loads(listed)["items"]
    return items


def serving(node: Node, namespace: str = "default") -> list[tuple[str, int]]:
    """What each replica of the job said last: its digest, and how many pages are shared."""
    found = []
    for pod in pods(node, "app=embeddings", namespace):
        log = node.kubectl("-n", namespace, "logs", pod["metadata"]["name"], "--tail=1")
        said = re.fullmatch(r"serving (\w{64}) (\d+)", log.strip())
        found.append((said[1], int(said[2])) if said else ("", 0))
    return found


def restarts(node: Node) -> int:
    return sum(
        status["restartCount"]
        for pod in pods(node, "app=embeddings")
        for status in pod["status"]["containerStatuses"]
    )


def memory(node: Node) -> int:
    """Bytes of anonymous memory and a fair share of the store, of all the job's processes."""
    total = 0
    for pod in pods(node, "app=embeddings"):
        uid = pod["metadata"]["uid"]
        for group in Path("/sys/fs/cgroup/memory").rglob(f"pod{uid}"):
            for file in group.rglob("cgroup.procs"):
                for pid in file.read_text().split():
                    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    total += 1024 * sum(
                        int(kib) for kib in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", rollup, re.M)
                    )
    return total


def unharmed(node: Node) -> bool:
    """Whether every replica still says the same digest, and never ended."""
    said = serving(node)
    return len(said) == REPLICAS and len({digest for digest, _ in said} - {""}) == 1


def test_the_chart_installs_with_all_hardening(node: Node, chart: Chart) -> None:
    node.kubectl("create", "namespace", NAMESPACE)
    ca = trustme.CA()
    for role in _ROLES:
        issued = ca.issue_cert(role.dns_name)
        files = {
            "tls.crt": b"".join(pem.bytes() for pem in issued.cert_chain_pems),
            "tls.key": issued.private_key_pem.bytes(),
            "ca.crt": ca.cert_pem.bytes(),
        }
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": f"tls-{role}"},
            "stringData": {name: content.decode() for name, content in files.items()},
        }
        node.kubectl("-n", NAMESPACE, "apply", "-f", "-", text=json.dumps(secret))
    chart.install("install")
    assert "Succeeded" in chart.helm("test", "samepage", "--timeout=180s")


def test_a_job_is_stored_once(node: Node, chart: Chart) -> None:
    node.kubectl("apply", "-f", ROOT / "deploy/examples/embeddings.yaml")
    node.kubectl("rollout", "status", "deployment/embeddings", "--timeout=180s")
    pages = TABLE_BYTES // 4096
    node.until(
        "the job's memory is shared",
        lambda: [shared >= 0.99 * pages for _, shared in serving(node)] == [True] * REPLICAS,
    )
    assert unharmed(node)
    assert memory(node) < 2 * TABLE_BYTES


def test_the_kubelet_restarts(node: Node, chart: Chart) -> None:
    node.restart_kubelet()
    chart.rolled_out()
    assert unharmed(node)
    assert restarts(node) == 0


def test_the_agents_are_rolled(node: Node, chart: Chart) -> None:
    for image in ("merger", "scanner"):
        name = f"localhost/samepage-{image}"
        run("buildah", "tag", f"{name}:{VERSION}", f"{name}:next")
        load(node, f"{name}:next")
    before = {pod["metadata"]["uid"] for pod in pods(node, AGENT, NAMESPACE)}
    node.kubectl(
        "-n",
        NAMESPACE,
        "set",
        "image",
        "daemonset/samepage-agent",
        "merger=localhost/samepage-merger:next",
        "scanner=localhost/samepage-scanner:next",
    )
    chart.rolled_out()
    assert not before & {pod["metadata"]["uid"] for pod in pods(node, AGENT, NAMESPACE)}
    node.until("the job is shared still", lambda: all(shared for _, shared in serving(node)))
    assert unharmed(node)
    assert restarts(node) == 0


def test_it_is_upgraded_and_rolled_back(node: Node, chart: Chart) -> None:
    chart.install("upgrade", "agent.merger.config.headroom_percent=50")
    assert unharmed(node)
    chart.helm("rollback", "samepage", "1")
    chart.rolled_out()
    assert unharmed(node)
    assert restarts(node) == 0


def test_it_is_uninstalled_under_the_job(node: Node, chart: Chart) -> None:
    said = serving(node)
    chart.helm("uninstall", "samepage", "--wait", "--timeout=120s")
    node.until("the agents are gone", lambda: not pods(node, AGENT, NAMESPACE))
    assert [digest for digest, _ in serving(node)] == [digest for digest, _ in said]
    assert unharmed(node)
    assert restarts(node) == 0
