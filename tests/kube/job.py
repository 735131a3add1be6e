"""What runs in the stories: the example job, and pods that run a program of this folder."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from helpers.chart import ROOT
from kube.processes import Until

EXAMPLE = ROOT / "deploy/examples/embeddings.yaml"
VERSION = "0.1.0"
REPLICAS = 4
TABLE_BYTES = 64 << 20
PAGES = TABLE_BYTES // 4096
#: Who may not say who it is, by what it shows, and what it is told then.
REFUSALS = {
    "own, for the job's domain": "may not use the domain 'default', only other",
    "forged": "the token is not valid",
    "for the API server": "the token is not valid",
    "none": "set SAMEPAGE_TOKEN_FILE",
}

Spec = dict[str, Any]


def manifests(replicas: int = REPLICAS, table_bytes: int = TABLE_BYTES) -> list[Spec]:
    """The example's ConfigMap and Deployment, perhaps smaller."""
    config, job = yaml.safe_load_all(EXAMPLE.read_text())
    job["spec"]["replicas"] = replicas
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (table,) = (each for each in container["env"] if each["name"] == "TABLE_BYTES")
    table["value"] = str(table_bytes)
    return [config, job]


class Said(NamedTuple):
    """What a replica said last: when, the digest of its table, how many pages of it are shared."""

    at: str = ""
    digest: str = ""
    shared: int = 0


def said(line: str) -> Said:
    """The last line of a replica's log, with its time; nothing when it says something else."""
    found = re.fullmatch(r"(\S+) serving (\w{64}) (\d+)", line.strip())
    return Said(found[1], found[2], int(found[3])) if found else Said()


def said_next(look: Callable[[], list[Said]], until: Until) -> list[Said]:
    """What each replica says from now on."""
    before = [each.at for each in look()]
    found: list[Said] = []

    def later() -> bool:
        found[:] = look()
        return all(new.at > old for new, old in zip(found, before, strict=True))

    until("each replica serves", later)
    return found


def intact(table_bytes: int = TABLE_BYTES) -> list[str]:
    """What the digests of all replicas are, by what they load."""
    table = random.Random(1).randbytes(table_bytes)
    return [hashlib.sha256(table).hexdigest()] * REPLICAS


def bare(name: str, *arguments: str) -> Spec:
    """The spec of a pod that runs a program of this folder, and knows nothing of samepage."""
    container = {
        "name": name,
        "image": f"localhost/samepage-scanner:{VERSION}",
        "command": ["python3", "-c", Path(__file__).with_name(f"{name}.py").read_text()],
        "args": list(arguments),
    }
    return {"restartPolicy": "Never", "containers": [container]}


def program(name: str, *arguments: str) -> Spec:
    """The same with the sockets, tokens for samepage and the API server, and a certificate."""
    tokens = [
        {"serviceAccountToken": {"audience": "samepage", "path": "samepage"}},
        {"serviceAccountToken": {"path": "api"}},
    ]
    spec = bare(name, *arguments)
    (container,) = spec["containers"]
    container["env"] = [{"name": "SAMEPAGE_TOKEN_FILE", "value": "/tokens/samepage"}]
    container["volumeMounts"] = [
        {"name": "samepage", "mountPath": "/run/samepage", "readOnly": True},
        {"name": "tokens", "mountPath": "/tokens", "readOnly": True},
        {"name": "certificate", "mountPath": "/certificate", "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    spec["volumes"] = [
        {"name": "samepage", "hostPath": {"path": "/run/samepage", "type": "Directory"}},
        {"name": "tokens", "projected": {"sources": tokens}},
        {"name": "certificate", "secret": {"secretName": "client-cert", "optional": True}},
        {"name": "tmp", "emptyDir": {}},
    ]
    return spec
