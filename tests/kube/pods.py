"""What a kubelet makes of a pod before its containers start, for a podman that knows few of it.

Secrets, ConfigMaps and tokens become folders of files, fields of the pod become values, and the
resource `samepage.io/userfaultfd` becomes the device. Probes are left out: nobody asks them here.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
#: Makes a token of a namespace's pod for an audience.
Tokens = Callable[[str, str], str]

_DEVICE = "samepage.io/userfaultfd"
_KEPT = ("name", "image", "command", "args", "securityContext")


@dataclass
class Kubelet:
    """Makes pods of one node plain.

    Attributes:
        directory: for the folders.
        node: its name.
        folders: where folders of the node really are.
        aliases: names of services, and their addresses.
        environment: what every container gets.
        tokens: gives tokens.
        authority: the certificate of who signs for the API server.
        objects: Secrets and ConfigMaps by kind and name.
    """

    directory: Path
    node: str
    folders: dict[str, Path]
    aliases: dict[str, str]
    environment: dict[str, str]
    tokens: Tokens
    authority: Path
    objects: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)

    def learn(self, manifests: Iterable[Spec]) -> None:
        """Remember the Secrets and ConfigMaps among some objects."""
        for each in manifests:
            if each["kind"] in ("Secret", "ConfigMap"):
                encoded = each.get("data", {}) if each["kind"] == "Secret" else {}
                plain = each.get("stringData" if each["kind"] == "Secret" else "data", {})
                content = {name: text.encode() for name, text in plain.items()}
                content |= {name: base64.b64decode(text) for name, text in encoded.items()}
                self.objects[each["kind"], each["metadata"]["name"]] = content

    def pod(self, name: str, spec: Spec, namespace: str, address: str = "") -> Spec:
        """A pod for podman.

        Args:
            spec: as the API server has it.
            address: its own, if that is known before.
        """
        fields = {"spec.nodeName": self.node, "status.podIP": address, "metadata.name": name}
        user = spec.get("securityContext", {})
        plain = {
            "restartPolicy": spec.get("restartPolicy", "Always"),
            "containers": [self._container(each, user, fields) for each in spec["containers"]],
            "volumes": [self._volume(each, name, namespace) for each in spec["volumes"]],
            "hostAliases": [{"ip": ip, "hostnames": [host]} for host, ip in self.aliases.items()],
        }
        if any(_wants_device(container) for container in spec["containers"]):
            device = {"path": "/dev/userfaultfd", "type": "CharDevice"}
            plain["volumes"].append({"name": "device", "hostPath": device})
        metadata = {"name": name, "labels": {"app": name}}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": plain}

    def _container(self, container: Spec, user: Spec, fields: dict[str, str]) -> Spec:
        plain = {name: container[name] for name in _KEPT if name in container}
        ids = {name: user[name] for name in ("runAsUser", "runAsGroup") if name in user}
        plain["securityContext"] = ids | plain.get("securityContext", {})
        plain["imagePullPolicy"] = "Never"
        values = dict(self.environment)
        for each in container.get("env", ()):
            source = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            text = fields[source] if source else each["value"]
            for known, value in values.items():
                text = text.replace(f"$({known})", value)
            values[each["name"]] = text
        plain["env"] = [{"name": name, "value": value} for name, value in values.items()]
        plain["volumeMounts"] = list(container.get("volumeMounts", ()))
        if _wants_device(container):
            plain["volumeMounts"].append({"name": "device", "mountPath": "/dev/userfaultfd"})
        return plain

    def _volume(self, volume: Spec, pod: str, namespace: str) -> Spec:
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            return volume | {"hostPath": {"path": str(self.folders.get(path, path))}}
        folder = self.directory / namespace / pod / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            folder.chmod(0o777)
        for name, content in self._files(volume, namespace).items():
            (folder / name).write_bytes(content)
        path = {"path": str(folder), "type": "Directory"}
        return {"name": volume["name"], "hostPath": path}

    def _files(self, volume: Spec, namespace: str) -> dict[str, bytes]:
        if "secret" in volume:
            source = volume["secret"]
            return _chosen(self.objects["Secret", source["secretName"]], source)
        if "configMap" in volume:
            source = volume["configMap"]
            return _chosen(self.objects["ConfigMap", source["name"]], source)
        files: dict[str, bytes] = {}
        for source in volume.get("projected", {}).get("sources", ()):
            if "serviceAccountToken" in source:
                token = source["serviceAccountToken"]
                files[token["path"]] = self.tokens(namespace, token.get("audience", "")).encode()
            elif "configMap" in source:
                files["ca.crt"] = self.authority.read_bytes()
        return files


def _wants_device(container: Spec) -> bool:
    return _DEVICE in container.get("resources", {}).get("limits", {})


def _chosen(content: dict[str, bytes], source: Spec) -> dict[str, bytes]:
    items = source.get("items")
    return {i["path"]: content[i["key"]] for i in items} if items else content


def token(namespace: str, audience: str) -> str:
    """A text in the form of a service account's token, another one each time."""
    claims = {
        "aud": [audience],
        "kubernetes.io": {"namespace": namespace},
        "sub": f"system:serviceaccount:{namespace}:default",
    }
    parts: tuple[Spec, ...] = ({"alg": "none"}, claims, {"signature": secrets.token_hex()})
    return ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts
    )
