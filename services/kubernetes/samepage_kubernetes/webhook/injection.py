"""What a pod lacks to use samepage, as a JSON patch.

Doing it twice is doing it once: what is there by its name, or at its path, stays as it is, so that
a pod may also have any of it by itself, with other values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from samepage_kubernetes.webhook.config import Config

INJECT = "samepage.io/inject"
SOCKETS = "samepage"
TOKEN = "samepage-token"
TOKEN_FILE = "token"

Json = dict[str, Any]


def is_wanted(pod: Json) -> bool:
    """Whether the pod asks for it, by a label or else an annotation."""
    metadata = pod.get("metadata") or {}
    for kind in ("labels", "annotations"):
        value = (metadata.get(kind) or {}).get(INJECT)
        if value is not None:
            return bool(value == "true")
    return False


def patch(pod: Json, config: Config) -> list[Json]:
    """The operations (RFC 6902) that give the pod what it lacks; none when it lacks nothing."""
    spec = pod.get("spec") or {}
    volumes, mounts, variables = _parts(config)
    operations = list(_add(spec, "/spec", "volumes", volumes, ("name",)))
    for kind in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(kind) or []):
            path = f"/spec/{kind}/{number}"
            operations += _add(container, path, "env", variables, ("name",))
            operations += _add(container, path, "volumeMounts", mounts, ("name", "mountPath"))
    return operations


def _parts(config: Config) -> tuple[list[Json], list[Json], list[Json]]:
    """Volumes, mounts and environment."""
    sockets = str(config.mount_dir)
    # The node may get its daemons later than this pod, which must not wait for them.
    volumes: list[Json] = [
        {
            "name": SOCKETS,
            "hostPath": {"path": str(config.socket_dir), "type": "DirectoryOrCreate"},
        }
    ]
    mounts: list[Json] = [{"name": SOCKETS, "mountPath": sockets, "readOnly": True}]
    variables = [{"name": "SAMEPAGE_DIR", "value": sockets}]
    if config.token:
        source = {
            "audience": config.token_audience,
            "expirationSeconds": config.token_expiration_seconds,
            "path": TOKEN_FILE,
        }
        projected = {"sources": [{"serviceAccountToken": source}]}
        volumes.append({"name": TOKEN, "projected": projected})
        mounts.append({"name": TOKEN, "mountPath": str(config.token_dir), "readOnly": True})
        file = str(config.token_dir / TOKEN_FILE)
        variables.append({"name": "SAMEPAGE_TOKEN_FILE", "value": file})
    return volumes, mounts, variables


def _add(
    owner: Json, path: str, key: str, wanted: list[Json], unique: tuple[str, ...]
) -> Iterator[Json]:
    """Operations that append to a list what is not in it, by any of its unique fields."""
    there = owner.get(key) or []
    taken = {(field, entry.get(field)) for entry in there for field in unique}
    lacking = [
        entry for entry in wanted if taken.isdisjoint((field, entry[field]) for field in unique)
    ]
    if lacking and not there:
        yield {"op": "add", "path": f"{path}/{key}", "value": lacking}
        return
    for entry in lacking:
        yield {"op": "add", "path": f"{path}/{key}/-", "value": entry}
