"""A real Redis Cluster on loopback: three primaries, each with a replica."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

DEADLINE = 30.0
PRIMARIES = 3
_SLOTS = 16384
_NODE_TIMEOUT_MS = "1000"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


class Node:
    """One server of the cluster."""

    def __init__(self, folder: Path, port: int, bus_port: int, options: tuple[str, ...]) -> None:
        folder.mkdir()
        program = shutil.which("redis-server")
        assert program is not None
        self.port = port
        self._log = folder / "server.log"
        self._command = [
            *(program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--save", ""),
            *("--cluster-node-timeout", _NODE_TIMEOUT_MS, "--repl-diskless-sync-delay", "0"),
            *options,
        ]
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """A connection to this node alone."""
        with redis.Redis(port=self.port, protocol=2) as client:
            yield client

    def ask(self, *command: object) -> Any:
        """The answer to one command."""
        with self.client() as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]

    @property
    def is_primary(self) -> bool:
        return bool(self.ask("ROLE")[0] == b"master")


class RedisCluster:
    """Six nodes that know each other.

    Args:
        folder: for the nodes' files.
        options: of every server.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        ports = free_ports(4 * PRIMARIES)
        pairs = zip(ports[::2], ports[1::2], strict=True)
        self.nodes = [
            Node(folder / f"node-{number}", port, bus, options)
            for number, (port, bus) in enumerate(pairs)
        ]
        try:
            self._join([bus for bus in ports[1::2]])
        except BaseException:
            self.kill()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.nodes[0].port}"

    def flush(self) -> None:
        """Forget everything, on every primary."""
        for node in self.primaries():
            node.ask("FLUSHALL", "SYNC")

    def all_keys(self) -> list[bytes]:
        """All there are, on every primary."""
        return [key for node in self.primaries() for key in node.ask("KEYS", "*")]

    def flush_scripts(self) -> None:
        """Forget the scripts, on every primary."""
        for node in self.primaries():
            node.ask("SCRIPT FLUSH")

    def primaries(self) -> list[Node]:
        """The nodes that are primaries now; those that are dead left out."""
        return [node for node in self.nodes if node.process.poll() is None and node.is_primary]

    def settle(self) -> None:
        """Wait until every node that lives finds the cluster in order."""
        eventually(self._is_whole)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def _join(self, bus_ports: list[int]) -> None:
        for node in self.nodes:
            eventually(lambda node=node: listens(node.port))  # type: ignore[misc]
        bounds = [number * _SLOTS // PRIMARIES for number in range(PRIMARIES + 1)]
        for node, first, end in zip(self.nodes, bounds, bounds[1:], strict=False):
            node.ask("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for node, bus in zip(self.nodes[1:], bus_ports[1:], strict=True):
            self.nodes[0].ask("CLUSTER MEET", "127.0.0.1", node.port, bus)
        eventually(lambda: all(known(node) == len(self.nodes) for node in self.nodes))
        for primary, replica in zip(self.nodes, self.nodes[PRIMARIES:], strict=False):
            replica.ask("CLUSTER REPLICATE", primary.ask("CLUSTER MYID"))
        eventually(self._has_replicas)
        self.settle()

    def _has_replicas(self) -> bool:
        return all(len(node.ask("ROLE")[2]) == 1 for node in self.nodes[:PRIMARIES])

    def _is_whole(self) -> bool:
        living = [node for node in self.nodes if node.process.poll() is None]
        states = {node.ask("CLUSTER INFO")["cluster_state"] for node in living}
        return len(self.primaries()) == PRIMARIES and states == {"ok"}


def known(node: Node) -> int:
    """How many nodes this one knows."""
    info = node.ask("CLUSTER INFO")
    return int(info["cluster_known_nodes"])


def listens(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def eventually(look: Callable[[], bool]) -> None:
    """Wait until `look` says so; fails when that takes too long."""
    deadline = time.monotonic() + DEADLINE
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)
