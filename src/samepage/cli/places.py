"""Where the daemons are: the hosts of a directory, one or those of `samepage up`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samepage.client import DEFAULT_DIRECTORY
from samepage.errors import InvalidArgumentError, NotFoundError, NotRunningError

CLUSTER_FILE = "cluster.json"


@dataclass(frozen=True)
class Host:
    """A host's name, socket directory, and gRPC addresses ("address:port", empty: not known).

    Attributes:
        metrics: where its daemons serve metrics over HTTP, by daemon.
        netns: the network namespace that its daemons run in; empty: this machine's own.
    """

    name: str
    directory: Path
    merger: str = ""
    scanner: str = ""
    arenas: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)
    netns: str = ""


@dataclass(frozen=True)
class Cluster:
    """The hosts, and the index's addresses: of gRPC and of its metrics (empty: not known)."""

    hosts: tuple[Host, ...]
    index: str = ""
    index_metrics: str = ""

    def to_json(self) -> dict[str, object]:
        """Return what cluster.json holds."""
        hosts = [
            {
                "name": host.name,
                "dir": str(host.directory),
                "merger": host.merger,
                "scanner": host.scanner,
                "arenas": host.arenas,
                "metrics": dict(host.metrics),
                "netns": host.netns,
            }
            for host in self.hosts
        ]
        return {"index": self.index, "index_metrics": self.index_metrics, "hosts": hosts}


def find(directory: Path | None) -> Cluster:
    """Return the hosts of a directory; default: $SAMEPAGE_DIR, else /run/samepage.

    Raises:
        NotRunningError: there is no such directory.
        InvalidArgumentError: its cluster.json is not one.
    """
    chosen = directory or Path(os.environ.get("SAMEPAGE_DIR") or DEFAULT_DIRECTORY)
    if not chosen.is_dir():
        raise NotRunningError(
            f"there is no directory {chosen}: start the daemons ('samepage up --dir {chosen}'), "
            "or name their directory with --dir or SAMEPAGE_DIR"
        )
    file = chosen / CLUSTER_FILE
    if not file.exists():
        return Cluster((Host("", chosen.absolute()),))
    return read(file)


def read(file: Path) -> Cluster:
    """Return what a cluster.json says.

    Raises:
        InvalidArgumentError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_text())
        hosts = tuple(
            Host(
                host["name"],
                Path(host["dir"]),
                host["merger"],
                host["scanner"],
                host.get("arenas", ""),
                host.get("metrics", {}),
                host.get("netns", ""),
            )
            for host in content["hosts"]
        )
        return Cluster(hosts, content["index"], content.get("index_metrics", ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"{file} cannot be read: {error}") from error


def named(hosts: Sequence[Host], name: str) -> list[Host]:
    """Return the hosts of this name; all of them for an empty one.

    Raises:
        NotFoundError: there is none.
    """
    chosen = [host for host in hosts if name in ("", host.name)]
    if not chosen:
        known = ", ".join(host.name for host in hosts if host.name) or "none by name"
        raise NotFoundError(f"there is no host {name!r} here; there is {known}")
    return chosen
