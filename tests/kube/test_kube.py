"""The chart on a real Kubernetes: installed, used, rolled, upgraded, removed under a running job.

The tests are one story and run in order: each begins where the one before ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.chart import CHART, TOOLS
from kube import certificates, figures, job
from kube.cluster import Cluster
from kube.machine import run

NAMESPACE = "samepage"
AGENT = "app.kubernetes.io/component=agent"
JOB = "app=embeddings"
OTHER = "other"
STORE = Path("/dev/shm/samepage")
SUCCEEDED = ("--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
INTACT = job.intact()
IMAGES = ("scanner", "merger", "index", "kubernetes")

pytestmark = [pytest.mark.needs("root", "away", "netns", "chart_tools"), pytest.mark.timeout(1200)]


class Chart:
    """Helm, and what it has installed."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def helm(self, *arguments: str) -> str:
        """Run helm in the chart's namespace."""
        place = ("--kubeconfig", self._cluster.kubeconfig, "--namespace", NAMESPACE)
        return run(TOOLS / "helm", *place, *arguments)

    def install(self, command: str, *settings: str) -> None:
        """Install or upgrade it with all hardening, and wait until all of it runs."""
        roles = {f"tls.existingSecrets.{role}": f"tls-{role}" for role in certificates.ROLES}
        values = {"recommendations.enabled": "true", "tls.mode": "existingSecrets", **roles}
        sets = [f"--set={name}={value}" for name, value in values.items()]
        extra = [f"--set={setting}" for setting in settings]
        self.helm(command, "samepage", str(CHART), *sets, *extra)
        self.rolled_out()

    def rolled_out(self) -> None:
        """Wait until the new version runs everywhere."""
        for kind in ("daemonset/samepage-agent", "deployment/samepage-index"):
            self._cluster.kubectl("-n", NAMESPACE, "rollout", "status", kind, "--timeout=240s")

    def domains(self) -> dict[str, dict[str, Any]]:
        """Return the merger's account of each domain, by its name."""
        place = ("-n", NAMESPACE, "exec", "daemonset/samepage-agent", "-c", "merger", "--")
        said = json.loads(self._cluster.kubectl(*place, "samepage", "status", "--json"))
        return {domain["name"]: domain for domain in said["hosts"][0]["account"]["domains"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with Cluster(directory, Path(os.environ["SAMEPAGE_KUBE_BINARIES"])) as cluster:
        for image in IMAGES:
            cluster.load(f"localhost/samepage-{image}:{job.VERSION}")
        yield cluster


@pytest.fixture(scope="module")
def chart(cluster: Cluster) -> Chart:
    return Chart(cluster)


def pods(cluster: Cluster, label: str, namespace: str = "default") -> list[dict[str, Any]]:
    listed = cluster.kubectl("-n", namespace, "get", "pods", "-l", label, "-o", "json")
    items: list[dict[str, Any]] = json.loads(listed)["items"]
    return items


def placed(cluster: Cluster, label: str, namespace: str = "default") -> set[str]:
    """The nodes that pods are on."""
    return {pod["spec"].get("nodeName", "") for pod in pods(cluster, label, namespace)}


def serving(cluster: Cluster, namespace: str = "default") -> list[job.Said]:
    """What each replica of the job says next."""
    names = [pod["metadata"]["name"] for pod in pods(cluster, JOB, namespace)]
    last = ("logs", "--tail=1", "--timestamps")

    def look() -> list[job.Said]:
        return [job.said(cluster.kubectl("-n", namespace, *last, name)) for name in names]

    return job.said_next(look, cluster.until)


def restarts(cluster: Cluster) -> int:
    return sum(
        status["restartCount"]
        for pod in pods(cluster, JOB)
        for status in pod["status"]["containerStatuses"]
    )


def processes(cluster: Cluster, namespace: str = "default") -> list[int]:
    """The job's processes, of all its replicas in a namespace."""
    found = pods(cluster, JOB, namespace)
    return [pid for pod in found for pid in figures.processes(f"pod{pod['metadata']['uid']}")]


def run_pod(
    cluster: Cluster, namespace: str, spec: job.Spec, labels: dict[str, str] | None = None
) -> Any:
    """What a pod printed until its end, as JSON."""
    name = spec["containers"][0]["name"]
    metadata = {"name": name, "labels": labels or {}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    cluster.kubectl("-n", namespace, "create", "-f", "-", text=json.dumps(pod))
    cluster.kubectl("-n", namespace, "wait", f"pod/{name}", *SUCCEEDED)
    said = json.loads(cluster.kubectl("-n", namespace, "logs", name))
    cluster.kubectl("-n", namespace, "delete", "pod", name)
    return said


def digests(cluster: Cluster) -> list[str]:
    """Of each replica's table, as it is now."""
    return [said.digest for said in serving(cluster)]


def test_the_chart_installs_with_all_hardening(cluster: Cluster, chart: Chart) -> None:
    cluster.kubectl("create", "namespace", NAMESPACE)
    for user, files in certificates.secrets().items():
        metadata = {"name": f"tls-{user}"}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": files}
        cluster.kubectl("-n", NAMESPACE, "apply", "-f", "-", text=json.dumps(secret))
    chart.install("install")
    assert "Succeeded" in chart.helm("test", "samepage", "--timeout=180s")


def test_a_job_is_stored_once(cluster: Cluster, chart: Chart) -> None:
    cluster.kubectl("apply", "-f", job.EXAMPLE)
    cluster.kubectl("rollout", "status", "deployment/embeddings", "--timeout=180s")
    cluster.until(
        "the job's memory is shared",
        lambda: all(said.shared >= 0.99 * job.PAGES for said in serving(cluster)),
    )
    assert digests(cluster) == INTACT
    mapped = figures.mapped(processes(cluster), STORE)
    assert mapped.files == 1
    assert mapped.resident > 0.99 * job.REPLICAS * job.TABLE_BYTES
    assert mapped.fair < 1.01 * job.TABLE_BYTES


def test_another_namespace_shares_nothing(cluster: Cluster, chart: Chart) -> None:
    cluster.kubectl("create", "namespace", OTHER)
    manifests = yaml.safe_dump_all(job.manifests(replicas=1))
    cluster.kubectl("-n", OTHER, "apply", "-f", "-", text=manifests)
    cluster.kubectl("-n", OTHER, "rollout", "status", "deployment/embeddings", "--timeout=180s")
    (said,) = serving(cluster, OTHER)
    assert (said.digest, said.shared) == (INTACT[0], 0)
    assert figures.mapped(processes(cluster, OTHER), STORE) == (0, 0, 0)
    domains = chart.domains()
    assert domains[OTHER]["arenas"] == 1
    assert domains[OTHER]["shared_pages"] == domains[OTHER]["saved_bytes"] == 0
    assert domains["default"]["saved_bytes"] > 2.9 * job.TABLE_BYTES


def test_who_cannot_say_who_it_is_gets_nothing(cluster: Cluster, chart: Chart) -> None:
    """In the other namespace, with what a pod there can have: tokens of its own, and none."""
    outcomes = run_pod(cluster, OTHER, job.program("impostor"))
    assert outcomes.pop("own") == OTHER
    assert outcomes.keys() == job.REFUSALS.keys()
    assert all(text in outcomes[token] for token, text in job.REFUSALS.items()), outcomes
    cluster.kubectl("delete", "namespace", OTHER)
    assert digests(cluster) == INTACT


def test_an_arena_is_cloned_to_another_node(cluster: Cluster, chart: Chart) -> None:
    name = cluster.join().name
    cluster.until("it has an agent", lambda: name in placed(cluster, AGENT, NAMESPACE))
    chart.rolled_out()
    source = f"{cluster.nodes[0].name}/embeddings-{pods(cluster, JOB)[0]['metadata']['name']}"
    copies = run_pod(cluster, "default", job.program("cloner", source) | {"nodeName": name})
    assert copies["whole"]["digest"] == copies["lazy"]["digest"] == INTACT[0]
    whole = copies["whole"]
    assert (whole["local"], whole["fetched"]) == (0, job.TABLE_BYTES)
    assert digests(cluster) == INTACT


def test_the_kubelet_restarts(cluster: Cluster, chart: Chart) -> None:
    cluster.restart_kubelet()
    chart.rolled_out()
    assert digests(cluster) == INTACT
    assert restarts(cluster) == 0


def test_the_agents_are_rolled(cluster: Cluster, chart: Chart) -> None:
    for image in ("merger", "scanner"):
        name = f"localhost/samepage-{image}"
        run("buildah", "tag", f"{name}:{job.VERSION}", f"{name}:next")
        cluster.load(f"{name}:next")
    before = {pod["metadata"]["uid"] for pod in pods(cluster, AGENT, NAMESPACE)}
    cluster.kubectl(
        "-n",
        NAMESPACE,
        "set",
        "image",
        "daemonset/samepage-agent",
        "merger=localhost/samepage-merger:next",
        "scanner=localhost/samepage-scanner:next",
    )
    chart.rolled_out()
    assert not before & {pod["metadata"]["uid"] for pod in pods(cluster, AGENT, NAMESPACE)}
    cluster.until("the job is shared still", lambda: all(said.shared for said in serving(cluster)))
    assert digests(cluster) == INTACT
    assert restarts(cluster) == 0


def test_it_is_upgraded_and_rolled_back(cluster: Cluster, chart: Chart) -> None:
    """To a chart with the webhook, with which a label is all that a pod needs."""
    secret = ("-n", NAMESPACE, "get", "secret", "tls-webhook", "-o", r"jsonpath={.data.ca\.crt}")
    chart.install(
        "upgrade",
        "agent.merger.config.headroom_percent=50",
        "webhook.enabled=true",
        "webhook.certificate.existingSecret=tls-webhook",
        f"webhook.certificate.caBundle={cluster.kubectl(*secret)}",
    )
    webhook = "deployment/samepage-webhook"
    cluster.kubectl("-n", NAMESPACE, "rollout", "status", webhook, "--timeout=120s")
    labels = {"samepage.io/inject": "true"}
    assert run_pod(cluster, "default", job.bare("labelled"), labels) == "default"
    assert digests(cluster) == INTACT
    chart.helm("rollback", "samepage", "1")
    chart.rolled_out()
    assert digests(cluster) == INTACT
    assert restarts(cluster) == 0


def test_it_is_uninstalled_under_the_job(cluster: Cluster, chart: Chart) -> None:
    chart.helm("uninstall", "samepage", "--wait", "--timeout=120s")
    cluster.until("the agents are gone", lambda: not pods(cluster, AGENT, NAMESPACE))
    assert digests(cluster) == INTACT
    assert restarts(cluster) == 0
