"""What crosses between two hosts, each in a network namespace of its own.

- Clone: an arena that the other host has nothing of, and a second one that is 90 % equal to it.
  Bytes are counted on the link, frames and all; the speed stands beside a plain grpc.aio stream of
  as many bytes on the same link, and beside Vineyard's migration of the same arrays.
- Demand faults: pages that were evicted, since the other host holds them, touched one by one in
  random order; beside an empty grpc.aio call on the same link.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import vineyard
from bench.holding import Holder, say
from bench.record import Aim, Record, median
from samepage.cli.cluster import LocalCluster
from samepage.cli.netns import Network

SOURCE, DESTINATION = "host-1", "host-2"
EQUAL_PART = 0.9
FAULTS = 2000
WARMING_BYTES = 4 << 20
_PUBLISHED_SECONDS = 120.0
_STREAM = "a grpc.aio byte stream"
_VINEYARD = "Vineyard's migration"


class Peer:
    """A grpc.aio server on the source host, and its client on the destination."""

    def __init__(self, network: Network) -> None:
        module = (sys.executable, "-m", "bench.stream")
        host = network.address(SOURCE)
        self._server = subprocess.Popen(
            network.command(SOURCE, *module, "serve", host), stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        address = f"{host}:{int(self._server.stdout.readline())}"
        self._client = subprocess.Popen(
            network.command(DESTINATION, *module, "read", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, kind: str, count: int) -> Any:
        """Have the client measure; see `bench.stream`."""
        assert self._client.stdin is not None and self._client.stdout is not None
        self._client.stdin.write(json.dumps([kind, count]) + "\n")
        self._client.stdin.flush()
        return json.loads(self._client.stdout.readline())

    def end(self) -> None:
        """End both."""
        assert self._client.stdin is not None
        self._client.stdin.close()
        self._client.wait()
        self._server.terminate()
        self._server.wait()


@dataclass(frozen=True)
class TwoHosts:
    """A running cluster of two hosts, its network, and the peer beside it."""

    cluster: LocalCluster
    network: Network
    peer: Peer

    def directory(self, host: str) -> Path:
        """Where the host's sockets are."""
        return next(each.directory for each in self.cluster.cluster.hosts if each.name == host)

    def holder(self, host: str, kind: str, size: int, seed: int = 1) -> Holder:
        """A process on a host; see `bench.holder`."""
        return Holder(kind, size, seed=seed, directory=self.directory(host))

    def sent_bytes(self) -> int:
        """What the source's link has carried so far, frames and all."""
        statistics = Path("/sys/class/net", self.network.link(SOURCE), "statistics")
        # The bridge's end receives what the host sends.
        return int((statistics / "rx_bytes").read_text())


@asynccontextmanager
async def two_hosts() -> AsyncIterator[TwoHosts]:
    """Two hosts, an index, and the peer; one holder is enough, as there is but one other host."""
    os.environ["SAMEPAGE_MERGER_MIN_HOLDERS"] = "1"
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as directory:
        async with LocalCluster(Path(directory), 2, say, netns=True) as cluster:
            assert cluster.network is not None
            peer = Peer(cluster.network)
            try:
                yield TwoHosts(cluster, cluster.network, peer)
            finally:
                peer.end()


@dataclass(frozen=True)
class Clones:
    """One run: seconds, and bytes on the link, of the first and the second clone."""

    seconds: tuple[float, float]
    sent: tuple[int, int]
    stream_seconds: float


def clone_run(hosts: TwoHosts, size: int, seed: int) -> Clones:
    """Clone an arena, then one that is 90 % equal to it."""
    seconds, sent = [], []
    with hosts.holder(DESTINATION, "copies", size) as copies:
        for part in (1.0, 1.0 - EQUAL_PART):
            with hosts.holder(SOURCE, "arena", size, seed) as source:
                if part < 1.0:
                    source.call("renew", part)
                before = hosts.sent_bytes()
                seconds.append(copies.call("clone", f"{SOURCE}/{source.call('name')}"))
                sent.append(hosts.sent_bytes() - before)
                if copies.call("digest") != source.call("digest"):
                    raise RuntimeError("the clone differs")
        copies.call("drop_copies")
        stream = hosts.peer.ask("stream", size)
    return Clones((seconds[0], seconds[1]), (sent[0], sent[1]), stream)


async def measure_clones(size: int, runs: int) -> list[Record]:
    """Fresh bytes each time; every peer once a run."""
    clones, others = [], []
    lacking = vineyard.missing()
    if lacking is not None:
        say(f"Vineyard is left out: {lacking}")
    async with two_hosts() as hosts:
        # Daemons run for days: what they load at the first clone of their lives is not its speed.
        await asyncio.to_thread(clone_run, hosts, WARMING_BYTES, 0)
        for run in range(runs):
            clones.append(await asyncio.to_thread(clone_run, hosts, size, run + 1))
            if lacking is None:
                others.append(await asyncio.to_thread(vineyard.run, size))
    names = (f"clone of {size >> 20} MiB", f"clone of {size >> 20} MiB that is 90 % there")
    moved = (size, round(size * (1 - EQUAL_PART)))
    records = []
    for at, (name, bytes_) in enumerate(zip(names, moved, strict=True)):
        sent = median([clone.sent[at] / bytes_ for clone in clones])
        assert sent is not None
        what = f"{name}: bytes sent"
        records.append(
            Record("hosts", what, "bytes missing", None, sent, "", runs, Aim("<=", 1.02))
        )
    speed = [size / clone.seconds[0] / (1 << 30) for clone in clones]
    stream = [size / clone.stream_seconds / (1 << 30) for clone in clones]
    records.append(_record(names[0], median(stream), median(speed), _STREAM, runs, 0.7))
    for at, (name, aim) in enumerate(zip(names, (4, 15), strict=True)):
        ours = median([size / clone.seconds[at] / (1 << 30) for clone in clones])
        theirs = median([size / other[at] / (1 << 30) for other in others])
        records.append(_record(name, theirs, ours, _VINEYARD, runs, aim))
    return records


def _record(
    what: str, peer: float | None, ours: float | None, peer_name: str, runs: int, aim: float
) -> Record:
    assert ours is not None
    return Record("hosts", f"{what}: speed", "GiB/s", peer, ours, peer_name, runs, Aim(">=", aim))


@contextmanager
def evicted(hosts: TwoHosts, size: int, seed: int) -> Iterator[Holder]:
    """An arena on one host, all of whose pages only the other one holds."""
    with (
        hosts.holder(SOURCE, "arena", size, seed) as holding,
        hosts.holder(DESTINATION, "arena", size, seed) as evicting,
    ):
        holding.call("share")
        deadline = time.monotonic() + _PUBLISHED_SECONDS
        while (report := evicting.call("evict"))["held_elsewhere"] < size // 4096:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the other host did not take them all: {report}")
            evicting.call("fetch")
            time.sleep(1.0)
        yield evicting


def faults_run(hosts: TwoHosts, size: int, seed: int) -> tuple[float, float]:
    """Median nanoseconds of an empty call, and of a touch of a page that is away."""
    with evicted(hosts, size, seed) as holder:
        trips = hosts.peer.ask("trips", FAULTS)
        faults = holder.call("touch_once", FAULTS)
    trip, fault = median(trips), median(faults)
    assert trip is not None and fault is not None
    return trip, fault


async def measure_faults(size: int, runs: int) -> list[Record]:
    """Fresh bytes each time."""
    async with two_hosts() as hosts:
        figures = [
            await asyncio.to_thread(faults_run, hosts, size, 100 + run) for run in range(runs)
        ]
    trip, fault = (median([each[at] / 1e6 for each in figures]) for at in (0, 1))
    assert fault is not None
    what = "demand fault from another host, p50"
    peer = "an empty grpc.aio call"
    return [Record("hosts", what, "ms", trip, fault, peer, runs, Aim("<=", 3))]
