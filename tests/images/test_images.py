"""The images that `make image-test` built without a registry: what they hold, and do they run."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.chart import ROOT

TARGETS = {
    "scanner": "samepage-scanner",
    "merger": "samepage-merger",
    "index": "samepage-index",
    "kubernetes": "samepage-device-plugin",
}
_NOBODY = "65532:65532"

pytestmark = [pytest.mark.needs("buildah", "root"), pytest.mark.slow]


def image(target: str) -> str:
    """An image's name."""
    return f"localhost/samepage-{target}:0.1.0"


def buildah(*arguments: str) -> str:
    """Run buildah; returns what it prints."""
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def containers() -> Iterator[dict[str, str]]:
    """A container of each image, as the image's user."""
    made: dict[str, str] = {}
    try:
        for target in TARGETS:
            made[target] = buildah("from", "--pull-never", image(target)).strip()
        yield made
    finally:
        for name in made.values():
            buildah("rm", name)


Containers = dict[str, str]


def run(containers: Containers, target: str, *command: str) -> str:
    """Run a command in the container of an image."""
    return buildah("run", "--isolation", "chroot", containers[target], "--", *command)


@pytest.mark.parametrize("target", TARGETS)
def test_says_what_it_is(containers: Containers, target: str) -> None:
    config = json.loads(buildah("inspect", "--type", "image", image(target)))["OCIv1"]["config"]
    assert config["User"] == _NOBODY
    assert config["Entrypoint"] == [TARGETS[target]]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"samepage-{target}"
    assert labels["org.opencontainers.image.version"] == "0.1.0"


@pytest.mark.parametrize("target", TARGETS)
def test_its_daemon_starts(containers: Containers, target: str) -> None:
    shown = run(containers, target, TARGETS[target], "--print-config")
    assert tomllib.loads(shown)


def test_it_has_no_compiler(containers: Containers) -> None:
    script = "id -u; command -v gcc cc make pip pip3 curl || true"
    assert run(containers, "merger", "sh", "-c", script).split() == ["65532"]


def test_the_library_is_for_its_c_library(containers: Containers) -> None:
    code = "from samepage import native; print(native.probe(None))"
    assert run(containers, "scanner", "python3", "-c", code)


def test_the_tryout_redis_takes_its_password_alone(containers: Containers) -> None:
    manifests = yaml.safe_load_all((ROOT / "deploy/k8s/base/samepage.yaml").read_text())
    (redis,) = (each for each in manifests if each["kind"] == "StatefulSet")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    for there, here in (
        ("/etc/samepage/redis", "/tmp"),
        ("dir /data", "dir /tmp"),
        ("port 6379", "port 0\nunixsocket /tmp/redis.sock"),
    ):
        assert there in script
        script = script.replace(there, here)
    program = Path(__file__).with_name("talk_to_redis.py").read_text()
    done = run(containers, "index", "python3", "-c", program, script)
    assert done.splitlines() == ["True", "Authentication required.", "False"]
