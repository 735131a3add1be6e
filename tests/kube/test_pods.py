"""The chart's pods, run by podman without a control plane: the short form of the other story.

What an API server says of tokens, a small server of the tests says here; what a kubelet gives to
containers, `pods` does. The tests are one story and run in order: each begins where the one before
ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_token_api import FakeTokenApi
from helpers.chart import objects
from kube import certificates, figures, job, pods
from kube.podman import GATEWAY, Podman
from kube.pods import Kubelet
from kube.processes import until

NAMESPACE = "samepage"
OTHER = "other"
JOB = [f"embeddings-{number}" for number in range(job.REPLICAS)]
TABLE_BYTES = 16 << 20
PAGES = TABLE_BYTES // 4096
HELPER = "198.18.110.31"
INTACT = job.intact(TABLE_BYTES)
NODES = {"node-1": "198.18.110.11", "node-2": "198.18.110.12"}
SERVICES = {"index": "198.18.110.21", "redis": "198.18.110.22"}

pytestmark = [
    pytest.mark.needs("root", "away", "netns", "chart_tools", "podman"),
    pytest.mark.timeout(300),
]


class Stage:
    """Two nodes, and the pods on them."""

    def __init__(self, podman: Podman, api: FakeTokenApi, directory: Path, shm: Path) -> None:
        self.stores = {name: shm / name for name in NODES}
        self.podman = podman
        self.replicas: list[int] = []
        self._api = api
        self._chart = objects(
            "existing-secrets",
            "--set=arenas.enabled=true",
            "--set=tls.existingSecrets.arenas=arenas-cert",
        )
        config, deployment = job.manifests(table_bytes=TABLE_BYTES)
        self.job: job.Spec = deployment["spec"]["template"]["spec"]
        self._kubelets = {name: self._kubelet(directory / name, name) for name in NODES}
        contents = {f"{role}-cert": files for role, files in certificates.secrets().items()}
        contents["samepage-secret"] = {
            name: secrets.token_hex(16) for name in ("secret", "redis-password")
        }
        given = [
            {"kind": "Secret", "metadata": {"name": name}, "stringData": content}
            for name, content in contents.items()
        ]
        for kubelet in self._kubelets.values():
            kubelet.learn([*self._chart, config, *given])

    def component(self, name: str, address: str, node: str = "node-1") -> str:
        """Start a pod of a component of the chart; return its name."""
        (spec,) = (
            each["spec"]["template"]["spec"]
            for each in self._chart
            if each["metadata"]["name"] == f"samepage-{name}" and "template" in each.get("spec", {})
        )
        pod = f"{name}-{node}"
        self.podman.play(self._kubelets[node].pod(pod, spec, NAMESPACE, address), address)
        return pod

    def run(
        self, name: str, spec: job.Spec, node: str = "node-1", namespace: str = "default"
    ) -> str:
        """Start an application's pod; return its name."""
        self.podman.play(self._kubelets[node].pod(name, spec, namespace))
        return name

    def program(self, name: str, *arguments: str, **place: str) -> Any:
        """What a program of this folder printed, as JSON, in a pod of its own."""
        pod = self.run(name, job.program(name, *arguments), **place)
        self.until(f"{name} has ended", lambda: self.podman.ended(pod) is not None)
        log = self.podman.logs(pod)
        assert self.podman.ended(pod) == 0, log
        self.podman.remove(pod)
        return json.loads(log.splitlines()[0])

    def until(self, what: str, condition: Any) -> None:
        """Wait until something is so."""
        until(what, condition, lambda: None)

    def status(self, node: str = "node-1") -> dict[str, Any] | None:
        """What the daemons of a node say, once they all do."""
        with contextlib.suppress(RuntimeError):
            said = self.podman.execute(f"agent-{node}", "merger", "samepage", "status", "--json")
            host: dict[str, Any] = json.loads(said)["hosts"][0]
            return host
        return None

    def installed(self, node: str) -> None:
        """Start the agent of a node, and wait until its daemons have found each other."""
        self.component("agent", NODES[node], node)
        self.until(
            f"{node} serves",
            lambda: bool((status := self.status(node)) and status["scanner"]["index_connected"]),
        )

    def serving(self, *names: str) -> list[job.Said]:
        """What each of some replicas, or all of the job's, says next."""

        def look() -> list[job.Said]:
            return [job.said(self.podman.last_line(name)) for name in names or JOB]

        return job.said_next(look, self.until)

    def digests(self) -> list[str]:
        """Of each replica's table, as it is now."""
        return [said.digest for said in self.serving()]

    def processes(self, *names: str) -> list[int]:
        """The processes of pods."""
        return [pid for name in names for pid in self.podman.processes(name)]

    def domains(self) -> dict[str, dict[str, Any]]:
        """The first node's account of each domain, by its name."""
        status = self.status()
        assert status
        return {domain["name"]: domain for domain in status["account"]["domains"]}

    def shared_pages(self, domain: str) -> int:
        """Of a domain on the first node; none where it has no arenas yet."""
        pages: int = self.domains().get(domain, {}).get("shared_pages", 0)
        return pages

    def _kubelet(self, directory: Path, name: str) -> Kubelet:
        sockets = directory / "sockets"
        for folder in (sockets, self.stores[name]):
            folder.mkdir(parents=True)
        addresses = {f"samepage-{each}.{NAMESPACE}.svc": ip for each, ip in SERVICES.items()}
        return Kubelet(
            directory,
            name,
            folders={"/run/samepage": sockets, "/dev/shm/samepage": self.stores[name]},
            aliases=addresses,
            environment={
                "KUBERNETES_SERVICE_HOST": self._api.host,
                "KUBERNETES_SERVICE_PORT": str(self._api.port),
            },
            tokens=lambda namespace, audience: self._token(namespace, audience, name),
            authority=self._api.ca_file,
        )

    def _token(self, namespace: str, audience: str, node: str) -> str:
        if namespace == NAMESPACE and not audience:
            return self._api.token_file.read_text().strip()
        token = pods.token(namespace, audience)
        return self._api.admit(token, namespace, audience, node_name=node)


@contextlib.contextmanager
def served(api: FakeTokenApi) -> Iterator[None]:
    """Serve from a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(api.start(), loop).result()
        yield
        asyncio.run_coroutine_threadsafe(api.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("pods")
    api = FakeTokenApi(directory, host=GATEWAY)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="samepage-pods-") as shm,
        Podman(directory) as podman,
        served(api),
    ):
        yield Stage(podman, api, directory, Path(shm))


def test_the_pods_of_the_chart_start(stage: Stage) -> None:
    stage.component("redis", SERVICES["redis"])
    stage.component("index", SERVICES["index"])
    stage.installed("node-1")


def test_a_job_is_stored_once(stage: Stage) -> None:
    for name in JOB:
        stage.run(name, stage.job)
    stage.until(
        "the job's memory is shared",
        lambda: all(said.shared >= 0.99 * PAGES for said in stage.serving()),
    )
    assert stage.digests() == INTACT
    mapped = figures.mapped(stage.processes(*JOB), stage.stores["node-1"])
    assert mapped.files == 1
    assert mapped.resident > 0.99 * job.REPLICAS * TABLE_BYTES
    assert mapped.fair < 1.01 * TABLE_BYTES
    stage.replicas = stage.processes(*JOB)


def test_another_namespace_shares_nothing(stage: Stage) -> None:
    name = stage.run("stranger", stage.job, namespace=OTHER)
    (said,) = stage.serving(name)
    assert (said.digest, said.shared) == (INTACT[0], 0)
    assert figures.mapped(stage.processes(name), stage.stores["node-1"]) == (0, 0, 0)
    domains = stage.domains()
    assert domains[OTHER]["arenas"] == 1
    assert domains[OTHER]["shared_pages"] == domains[OTHER]["saved_bytes"] == 0
    assert domains["default"]["saved_bytes"] > 2.9 * TABLE_BYTES
    stage.podman.remove(name, seconds=0)


def test_who_cannot_say_who_it_is_gets_nothing(stage: Stage) -> None:
    outcomes = stage.program("impostor", namespace=OTHER)
    assert outcomes.pop("own") == OTHER
    assert outcomes.keys() == job.REFUSALS.keys()
    assert all(text in outcomes[token] for token, text in job.REFUSALS.items()), outcomes


def test_an_arena_is_cloned_to_another_node(stage: Stage) -> None:
    stage.installed("node-2")
    copies = stage.program("cloner", f"node-1/embeddings-{JOB[0]}", node="node-2")
    assert copies["whole"]["digest"] == copies["lazy"]["digest"] == INTACT[0]
    assert (copies["whole"]["local"], copies["whole"]["fetched"]) == (0, TABLE_BYTES)


def test_arenas_are_held_for_others(stage: Stage) -> None:
    stage.component("arenas", HELPER)
    assert stage.program("client", f"{HELPER}:7174", NAMESPACE) == {
        "domain": NAMESPACE,
        "same": True,
    }
    stage.podman.remove("arenas-node-1")


def test_the_agent_is_replaced_under_the_job(stage: Stage) -> None:
    stage.podman.remove("agent-node-1")
    assert stage.digests() == INTACT
    stage.installed("node-1")
    stage.until(
        "the job is in the new merger's books",
        lambda: stage.shared_pages("default") >= 0.99 * PAGES * job.REPLICAS,
    )
    assert stage.digests() == INTACT


def test_all_of_it_is_removed_under_the_job(stage: Stage) -> None:
    for name in ("agent-node-1", "agent-node-2", "index-node-1", "redis-node-1"):
        stage.podman.remove(name)
    assert stage.digests() == INTACT
    assert stage.processes(*JOB) == stage.replicas
