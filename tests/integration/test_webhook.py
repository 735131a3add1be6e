"""The webhook over HTTPS, with reviews as an API server sends them."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import structlog
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.scrape import scrape
from helpers.waiting import until

from samepage.daemon.config import ConfigError
from samepage.daemon.server import ListenError, run
from samepage_kubernetes.webhook.config import Config
from samepage_kubernetes.webhook.service import WebhookService

NAME = "samepage-webhook.samepage.svc"

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"generateName": "job-", "labels": {"samepage.io/inject": "true"}},
    "spec": {
        "initContainers": [{"name": "load", "image": "i"}],
        "containers": [
            {
                "name": "work",
                "image": "i",
                "env": [{"name": "A", "value": "b"}],
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            },
            {"name": "side", "image": "i"},
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
    },
}
MOUNTS = [
    {"name": "samepage", "mountPath": "/run/samepage", "readOnly": True},
    {"name": "samepage-token", "mountPath": "/var/run/secrets/samepage.io", "readOnly": True},
]
VARIABLES = [
    {"name": "SAMEPAGE_DIR", "value": "/run/samepage"},
    {"name": "SAMEPAGE_TOKEN_FILE", "value": "/var/run/secrets/samepage.io/token"},
]


class Files:
    """The webhook's certificate, and who trusts it."""

    def __init__(self, directory: Path) -> None:
        self.cert, self.key = directory / "tls.crt", directory / "tls.key"
        self.trust = self.renew()

    def renew(self) -> ssl.SSLContext:
        """A certificate of a new authority; returns what trusts only that."""
        authority = trustme.CA()
        issued = authority.issue_cert(NAME)
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        return trust


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def config(files: Files, **settings: Any) -> Config:
    here: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "tls_cert_file": files.cert,
        "tls_key_file": files.key,
    }
    return Config(**(here | settings))


@pytest.fixture
async def webhook(files: Files, tmp_path: Path) -> AsyncIterator[WebhookService]:
    service = WebhookService(
        config(files, ready_file=tmp_path / "ready.json", metrics_listen="127.0.0.1:0")
    )
    running = asyncio.create_task(run(service))
    await until((tmp_path / "ready.json").exists)
    yield service
    os.kill(os.getpid(), signal.SIGTERM)
    await running


async def post(address: str, trust: ssl.SSLContext, body: object) -> tuple[int, Any]:
    """Send a review as an API server does: by the name of the service."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"https://{address}/inject?timeout=10s", data=data, ssl=trust, server_hostname=NAME
        ) as answer,
    ):
        text = await answer.text()
        return answer.status, json.loads(text) if answer.status == 200 else text


def review(pod: object, kind: str = "Pod", version: str = "admission.k8s.io/v1") -> dict[str, Any]:
    return {
        "apiVersion": version,
        "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5",
            "kind": {"group": "", "version": "v1", "kind": kind},
            "namespace": "shop",
            "operation": "CREATE",
            "object": pod,
        },
    }


async def admit(webhook: WebhookService, files: Files, pod: object, **other: str) -> Any:
    """The response to a review of a pod."""
    status, answer = await post(webhook.address, files.trust, review(pod, **other))
    assert status == 200
    assert (answer["apiVersion"], answer["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    assert answer["response"]["uid"] == "705ab4f5"
    assert answer["response"]["allowed"] is True
    return answer["response"]


def patched(pod: dict[str, Any], response: Any) -> dict[str, Any]:
    """The pod as the API server makes it of the patch, which only ever adds."""
    pod = copy.deepcopy(pod)
    assert response["patchType"] == "JSONPatch"
    for operation in json.loads(base64.b64decode(response["patch"])):
        assert operation["op"] == "add"
        *parents, last = operation["path"].split("/")[1:]
        target: Any = pod
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if last == "-":
            target.append(operation["value"])
        else:
            # As the standard has it, this replaces what is there.
            assert not target.get(last)
            target[last] = operation["value"]
    return pod


async def test_a_pod_gets_all_that_it_needs(webhook: WebhookService, files: Files) -> None:
    spec = patched(POD, await admit(webhook, files, POD))["spec"]
    data, sockets, token = spec["volumes"]
    assert data == {"name": "data", "emptyDir": {}}
    assert sockets["hostPath"] == {"path": "/run/samepage", "type": "DirectoryOrCreate"}
    [source] = token["projected"]["sources"]
    assert source["serviceAccountToken"] == {
        "audience": "samepage",
        "expirationSeconds": 3600,
        "path": "token",
    }
    [load] = spec["initContainers"]
    work, side = spec["containers"]
    for container in (load, side):
        assert (container["volumeMounts"], container["env"]) == (MOUNTS, VARIABLES)
    assert work["volumeMounts"] == [{"name": "data", "mountPath": "/data"}, *MOUNTS]
    assert work["env"] == [{"name": "A", "value": "b"}, *VARIABLES]


async def test_twice_is_once(webhook: WebhookService, files: Files) -> None:
    pod = patched(POD, await admit(webhook, files, POD))
    assert "patch" not in await admit(webhook, files, pod)


async def test_what_a_pod_has_by_itself_stays(webhook: WebhookService, files: Files) -> None:
    pod = copy.deepcopy(POD)
    work = pod["spec"]["containers"][0]
    work["env"].append({"name": "SAMEPAGE_DIR", "value": "/elsewhere"})
    work["volumeMounts"].append({"name": "data", "mountPath": "/run/samepage"})
    result = patched(pod, await admit(webhook, files, pod))["spec"]["containers"][0]
    assert result["env"][1:] == [{"name": "SAMEPAGE_DIR", "value": "/elsewhere"}, VARIABLES[1]]
    assert result["volumeMounts"][1:] == [
        {"name": "data", "mountPath": "/run/samepage"},
        MOUNTS[1],
    ]


@pytest.mark.parametrize(
    ("metadata", "injected"),
    [
        ({"labels": {"samepage.io/inject": "true"}}, True),
        ({"annotations": {"samepage.io/inject": "true"}}, True),
        (
            {
                "labels": {"samepage.io/inject": "false"},
                "annotations": {"samepage.io/inject": "true"},
            },
            False,
        ),
        ({"labels": {"samepage.io/inject": "yes"}}, False),
        ({"labels": {"app": "job"}, "annotations": None}, False),
        ({}, False),
    ],
)
async def test_who_asks(
    webhook: WebhookService, files: Files, metadata: dict[str, Any], injected: bool
) -> None:
    response = await admit(webhook, files, {**POD, "metadata": metadata})
    assert ("patch" in response) is injected


async def test_what_is_no_pod_is_left_alone(webhook: WebhookService, files: Files) -> None:
    assert "patch" not in await admit(webhook, files, POD, kind="Deployment")
    # A deletion has no object.
    assert "patch" not in await admit(webhook, files, None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff",
        [],
        {},
        review(POD, version="admission.k8s.io/v1beta1"),
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"},
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {"uid": 7}},
        review({**POD, "spec": [7]}),
        review({**POD, "spec": {"containers": [7]}}),
    ],
)
async def test_bad_reviews(webhook: WebhookService, files: Files, body: object) -> None:
    status, text = await post(webhook.address, files.trust, body)
    assert status == 400
    assert text
    # And it goes on.
    assert "patch" in await admit(webhook, files, POD)


async def test_only_reviews_are_answered(webhook: WebhookService, files: Files) -> None:
    async with aiohttp.ClientSession() as session:
        for method, path, status in (("GET", "/inject", 405), ("POST", "/other", 404)):
            url = f"https://{webhook.address}{path}"
            async with session.request(
                method, url, ssl=files.trust, server_hostname=NAME
            ) as answer:
                assert answer.status == status


async def test_a_new_certificate_is_taken(webhook: WebhookService, files: Files) -> None:
    assert "patch" in await admit(webhook, files, POD)
    good = files.cert.read_bytes()
    before = files.trust
    with structlog.testing.capture_logs() as logs:
        files.cert.write_text("half a fi")
        await until(lambda: any(log["event"] == "certificate not changed" for log in logs))
    assert (await post(webhook.address, before, review(POD)))[0] == 200
    files.cert.write_bytes(good)
    files.trust = files.renew()

    async def trusted() -> bool:
        try:
            return (await post(webhook.address, files.trust, review(POD)))[0] == 200
        except aiohttp.ClientConnectorCertificateError:
            return False

    async with asyncio.timeout(20):
        while not await trusted():
            await asyncio.sleep(0.05)
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await post(webhook.address, before, review(POD))


async def test_health_and_metrics(webhook: WebhookService, files: Files, tmp_path: Path) -> None:
    await admit(webhook, files, POD)
    await post(webhook.address, files.trust, b"")
    ready = json.loads((tmp_path / "ready.json").read_text())
    async with grpc.aio.insecure_channel(ready["address"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    found = await asyncio.to_thread(scrape, ready["metrics"])
    outcomes = ("injected", "complete", "unasked", "bad")
    counts = [found.value("samepage_webhook_reviews_total", outcome=one) for one in outcomes]
    assert counts == [1, 0, 0, 1]


async def test_without_a_token(files: Files) -> None:
    service = WebhookService(config(files, token=False, socket_dir=Path("/srv/sockets")))
    await service.start()
    spec = patched(POD, await admit(service, files, POD))["spec"]
    assert [volume["name"] for volume in spec["volumes"]] == ["data", "samepage"]
    assert spec["volumes"][1]["hostPath"]["path"] == "/srv/sockets"
    assert spec["initContainers"][0]["volumeMounts"] == MOUNTS[:1]
    assert spec["initContainers"][0]["env"] == VARIABLES[:1]
    await service.close()


async def test_an_address_in_use(webhook: WebhookService, files: Files) -> None:
    other = WebhookService(config(files, listen=webhook.address))
    with pytest.raises(ListenError, match="cannot listen on 127"):
        await other.start()
    await other.close()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    env = {**os.environ, "SAMEPAGE_WEBHOOK_TLS_CERT_FILE": str(tmp_path / "none")}
    command = [sys.executable, "-m", "samepage_kubernetes.webhook"]
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "are not a certificate and its key" in ended.stderr


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"listen": "8443"}, "give host:port"),
        ({"listen": "unix:/run/x"}, "listen must be host:port"),
        ({"socket_dir": Path("run")}, "socket_dir must be an absolute path"),
        ({"token_audience": ""}, "token_audience must not be empty"),
        ({"token_expiration_seconds": 599}, "token_expiration_seconds must be 600 or more"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Config(**settings)
