"""The chart renders for every documented combination of values, as valid Kubernetes objects."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml
from helpers.chart import CASES, CHART, ROOT, Manifest, objects, template, tool

pytestmark = pytest.mark.needs("chart_tools")

#: The newest minor versions that the validator knows.
VERSIONS = ("1.35", "1.36", "1.37")
_FOREIGN = ("monitoring.coreos.com/", "cert-manager.io/")


def validate(manifests: tuple[Manifest, ...], version: str) -> None:
    """Hold objects to the schemas of a Kubernetes version; unknown fields are errors."""
    for each in manifests:
        if not each["apiVersion"].startswith(_FOREIGN):
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_lints(case: str) -> None:
    done = tool("helm", "lint", "--strict", CHART, "-f", CASES[case])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_renders_the_same_twice(case: str) -> None:
    assert template(case) == template.__wrapped__(case)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_is_valid(case: str, version: str) -> None:
    validate(objects(case), version)


@pytest.mark.parametrize("overlay", ["base", "overlays/external-redis"])
def test_kustomize_builds_valid_manifests(overlay: str) -> None:
    done = tool("kustomize", "build", ROOT / "deploy" / "k8s" / overlay)
    assert done.returncode == 0, done.stderr
    manifests = tuple(yaml.safe_load_all(done.stdout))
    for version in VERSIONS:
        validate(manifests, version)
    tryout = [each for each in manifests if each["metadata"]["name"] == "samepage-redis"]
    assert bool(tryout) == (overlay == "base")


def test_names_of_another_release() -> None:
    done = tool("helm", "template", "other", CHART, "-n", "elsewhere", "-f", CASES["recommended"])
    assert done.returncode == 0, done.stderr
    for each in yaml.safe_load_all(done.stdout):
        assert each["metadata"]["name"].startswith("other"), each
        assert each["metadata"].get("namespace", "elsewhere") == "elsewhere", each
        assert "samepage.svc" not in str(each)


REFUSED = {
    "index.replicas=two": "/index/replicas",
    "index.replica=2": "'replica'",
    "agent.merger.config.store_limit=1": "'store_limit'",
    "agent.scanner.config.cpu_percent=much": "/agent/scanner/config/cpu_percent",
    "agent.merger.store.type=disk": "/agent/merger/store/type",
    "agent.socketDir=run": "/agent/socketDir",
    "externalRedis.url=redis://user:password@host": "/externalRedis/url",
    "externalRedis.urlKey=url": "externalRedis.existingSecret",
    "tls.mode=on": "/tls/mode",
    "tls.mode=existingSecrets": "tls.existingSecrets.",
    "tls.mode=certManager": "tls.certManager.issuerRef",
    "recommendations.enabled=true": "tls.mode",
    "recommendations.enabled=true,identity.mode=socket,tls.mode=certManager": "identity.mode",
    "identity.mode=guess": "/identity/mode",
    "identity.trustGroups.shop.pods[0]=x": "'pods'",
    "redis.enabled=false,index.replicas=2": "index.replicas",
    "webhook.enabled=true": "webhook.certificate",
    "webhook.enabled=true,webhook.certificate.existingSecret=s": "webhook.certificate.caBundle",
    "image.pullPolicy=Sometimes": "/image/pullPolicy",
    "devicePlugin.image.digest=sha256:1": "/devicePlugin/image/digest",
}


@pytest.mark.parametrize("values", REFUSED)
def test_refuses_and_names_the_key(values: str) -> None:
    done = tool("helm", "template", CHART, "--set", values)
    assert done.returncode != 0
    assert REFUSED[values] in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_nothing_holds_an_uninstall_up(case: str) -> None:
    for each in objects(case):
        metadata = each["metadata"]
        assert "finalizers" not in metadata
        hook = metadata.get("annotations", {}).get("helm.sh/hook")
        assert hook in (None, "test"), metadata["name"]
        for webhook in each.get("webhooks", ()):
            assert webhook["failurePolicy"] == "Ignore"
