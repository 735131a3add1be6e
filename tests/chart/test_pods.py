"""What the chart's pods may do, mount and read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.chart import CASES, Manifest, named, objects, pods

from samepage.daemon.config import load
from samepage.daemon.identity.base import Subject
from samepage.daemon.identity.policy import Policy
from samepage_index.config import IndexConfig
from samepage_kubernetes.device_plugin.config import Config as DevicePluginConfig
from samepage_kubernetes.webhook.config import Config as WebhookConfig
from samepage_merger.config import Config as MergerConfig
from samepage_merger.holding.config import Config as ArenasConfig
from samepage_scanner.config import Config as ScannerConfig

pytestmark = pytest.mark.needs("chart_tools")

SETTINGS: dict[str, Any] = {
    "arenas": ArenasConfig,
    "device_plugin": DevicePluginConfig,
    "index": IndexConfig,
    "merger": MergerConfig,
    "scanner": ScannerConfig,
    "webhook": WebhookConfig,
}
NAMES = {"spec.nodeName": "node-1", "status.podIP": "10.0.0.1"}


def each_container(case: str) -> list[tuple[str, Manifest, Manifest]]:
    """(pod's name, pod, container) of a case."""
    return [
        (name, pod, container)
        for name, pod in pods(objects(case))
        for container in pod["containers"]
    ]


@pytest.mark.parametrize("case", CASES)
def test_least_privilege(case: str) -> None:
    for name, pod, container in each_container(case):
        place = f"{name}/{container['name']}"
        may = container["securityContext"]
        scans = case == "process-scan" and container["name"] == "scanner"
        assert may["capabilities"].get("add", []) == (["SYS_PTRACE"] if scans else []), place
        assert may["capabilities"]["drop"] == ["ALL"], place
        assert may["readOnlyRootFilesystem"], place
        assert not may["allowPrivilegeEscalation"] and not may["privileged"], place
        assert may["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert pod.get("hostPID", False) == (case == "process-scan" and name.endswith("agent"))
        assert not pod.get("hostNetwork") and not pod.get("hostIPC"), place
        assert not pod["automountServiceAccountToken"], place
        root = container["name"] in ("merger", "scanner", "device-plugin")
        assert (may["runAsUser"] == 0) == root, place
        assert may.get("runAsNonRoot", False) == (not root), place


@pytest.mark.parametrize("case", CASES)
def test_only_the_merger_gets_the_device(case: str) -> None:
    asking = [
        container["name"]
        for _, _, container in each_container(case)
        if "samepage.io/userfaultfd" in container["resources"].get("limits", {})
    ]
    assert asking == ["merger"]


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_mounted_is_there(case: str) -> None:
    config_maps = {
        each["metadata"]["name"] for each in objects(case) if each["kind"] == "ConfigMap"
    }
    accounts = {
        each["metadata"]["name"] for each in objects(case) if each["kind"] == "ServiceAccount"
    }
    for name, pod in pods(objects(case)):
        volumes = {volume["name"]: volume for volume in pod["volumes"]} if "volumes" in pod else {}
        mounted = {
            mount["name"]
            for container in pod["containers"]
            for mount in container.get("volumeMounts", ())
        }
        assert mounted == set(volumes), name
        for volume in volumes.values():
            assert volume.get("configMap", {}).get("name") in {None, *config_maps}
        assert pod.get("serviceAccountName") in {None, *accounts}, name


@pytest.mark.parametrize("case", CASES)
def test_hosts_directories(case: str) -> None:
    """Of the node's directories just those of the documentation are writable."""
    writable = set()
    for name, pod in pods(objects(case)):
        paths = {
            volume["name"]: volume["hostPath"]["path"]
            for volume in pod.get("volumes", ())
            if "hostPath" in volume
        }
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] in paths and not mount.get("readOnly"):
                    writable.add((f"{name}/{container['name']}", paths[mount["name"]]))
    store = {("samepage-agent/merger", "/dev/shm/samepage")} if case != "pod-store" else set()
    spill = {("samepage-agent/merger", "/mnt/fast/samepage")} if case == "spill" else set()
    assert writable == store | spill | {
        ("samepage-agent/merger", "/run/samepage"),
        ("samepage-agent/scanner", "/run/samepage"),
        ("samepage-device-plugin/device-plugin", "/var/lib/kubelet/device-plugins"),
    }


@pytest.mark.parametrize("case", CASES)
def test_daemons_take_their_settings(case: str, tmp_path: Path) -> None:
    for name, _, container in each_container(case):
        sections = [file for file in container.get("args", ()) if str(file).endswith(".toml")]
        for file in sections:
            section = Path(file).stem
            config_map = named(case, "ConfigMap", name.removeprefix("samepage-"))
            path = tmp_path / Path(file).name
            path.write_text(with_files(config_map["data"][path.name], tmp_path))
            settings = load(SETTINGS[section], section, path, environment(container))
            assert_mounted(settings, container, tmp_path)
            assert {probed_port(container)} == {int(settings.health_listen.rpartition(":")[2])}


def with_files(toml: str, root: Path) -> str:
    """The settings with what they name in /etc at `root`, where there are such files."""
    moved = toml.replace('"/etc/', f'"{root}/etc/')
    for name in re.findall(f'"({re.escape(str(root))}/[^"]+)"', moved):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return moved


def environment(container: Manifest) -> dict[str, str]:
    """A container's variables, with what the kubelet would put in."""
    found: dict[str, str] = {}
    for each in container.get("env", ()):
        source = each.get("valueFrom", {})
        if "fieldRef" in source:
            found[each["name"]] = NAMES[source["fieldRef"]["fieldPath"]]
        elif "secretKeyRef" in source:
            found[each["name"]] = "redis://user@redis:6379"
        else:
            value = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], each["value"])
            found[each["name"]] = value
    return found


def assert_mounted(settings: Any, container: Manifest, root: Path) -> None:
    """Every file and directory of the settings lies in a volume."""
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for field, value in vars(settings).items():
        asks = getattr(settings, "identity", "token") == "token"
        elsewhere = ("device", "socket_dir", "mount_dir", "token_dir")  # in other containers
        unused = field in elsewhere or (field.startswith("token_") and not asks)
        if isinstance(value, Path) and not unused:
            place = Path("/", value.relative_to(root)) if value.is_relative_to(root) else value
            assert any(place.is_relative_to(mount) for mount in mounts), (field, value)


def probed_port(container: Manifest) -> int:
    """Where readiness is asked."""
    port = container["readinessProbe"]["grpc"]["port"]
    assert isinstance(port, int)
    assert port in [each["containerPort"] for each in container["ports"]]
    return port


def test_trust_groups_are_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(named("trust-groups", "ConfigMap", "identity")["data"]["policy.toml"])
    policy = Policy(path, tokens=True)

    def domain(namespace: str, account: str = "default") -> str:
        subject = Subject(uid=1000, gids=frozenset(), namespace=namespace, service_account=account)
        return policy.choose(subject, "")

    assert domain("cart-eu") == "shop"
    assert domain("serving") == domain("batch", "llm") == "models"
    assert domain("batch") == "batch"


@pytest.mark.parametrize("case", CASES)
def test_nobody_may_more_than_review_tokens(case: str) -> None:
    rules = [
        rule
        for each in objects(case)
        if each["kind"] in ("Role", "ClusterRole")
        for rule in each["rules"]
    ]
    review = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"]}
    assert rules == ([] if case == "socket-identity" else [{**review, "verbs": ["create"]}])


def test_a_settings_value_of_the_users_wins() -> None:
    toml = named("placement", "ConfigMap", "agent")["data"]["scanner.toml"]
    assert tomllib.loads(toml)["scanner"]["cpu_percent"] == 25.5
    assert tomllib.loads(toml)["scanner"]["min_run_pages"] == 4


def test_pods_are_replaced_when_their_settings_change() -> None:
    def checksum(*options: str) -> list[Any]:
        return [
            each["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for each in objects("default", *options)
            if each["kind"] in ("DaemonSet", "Deployment")
        ]

    before = checksum()
    options = [
        f"{name}.config.log_level=debug" for name in ("agent.merger", "devicePlugin", "index")
    ]
    assert all(
        old != new for old, new in zip(before, checksum("--set", ",".join(options)), strict=True)
    )
