"""What sharing costs in memory: the books when it is done, and the extra while it goes on.

Books: what the daemons' and the applications' own memory grew by, from before the arenas were
made until they are shared and all is at rest, besides the arenas and the store; in bytes a page of
all arenas. The extra while merging: the most that arenas, store and all processes held together at
any time, above what they held before, sampled from /proc as often as it goes. Before, the scanner
has looked at the arenas, so that its books, which stay, are not counted once more.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from bench.holder import PAGE
from bench.holding import Holder, host, sockets
from bench.record import Aim, Record, median
from samepage.cli import daemons
from samepage.cli.cluster import LocalCluster
from samepage.cli.demo.measure import byte_fields, resident_bytes

_SMALL = 1 << 20
_REST_SECONDS = 1.0
_REST_TIMES = 30
_HOLDERS = 2


def anonymous(pids: Iterable[int]) -> int:
    """Bytes of anonymous memory that is there."""
    return sum(byte_fields(Path(f"/proc/{pid}/status"))["RssAnon"] for pid in pids)


def settled(pids: Iterable[int]) -> int:
    """The same, exactly: the counts that /proc/PID/status shows lag behind a little."""
    return sum(byte_fields(Path(f"/proc/{pid}/smaps_rollup"))["Pss_Anon"] for pid in pids)


def at_rest(pids: Iterable[int]) -> int:
    """The same once it does not change any more: what was shared is told to the index, too."""
    held = [settled(pids)]
    while len(held) < 2 or held[-1] != held[-2]:
        if len(held) > _REST_TIMES:
            raise RuntimeError(f"the daemons' memory does not come to rest: {held}")
        time.sleep(_REST_SECONDS)
        held.append(settled(pids))
    return held[-1]


class Peak:
    """The most memory that processes and a store held while the context lasted, in bytes."""

    def __init__(self, pids: Iterable[int], store: Path) -> None:
        self._pids = list(pids)
        self._store = store
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.bytes = 0

    def held(self) -> int:
        """What they hold now."""
        return anonymous(self._pids) + resident_bytes(self._store)

    def _watch(self) -> None:
        while not self._over.is_set():
            self.bytes = max(self.bytes, self.held())
            # a core of two must stay with what is measured
            os.sched_yield()
            self._over.wait(0.002)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def one_run(cluster: LocalCluster, size: int) -> tuple[float, float]:
    """Bytes of books a page, and the extra memory while merging, MiB."""
    # the index is no process of a host: one serves a cluster
    services = [pid for name, pid in cluster.pids().items() if name != "index"]
    with ExitStack() as stack:

        def hold(bytes_: int) -> Holder:
            holder = Holder("arena", bytes_, directory=sockets(cluster))
            return stack.enter_context(holder)

        small = [hold(_SMALL) for _ in range(_HOLDERS)]
        small[0].call("share")
        # what a process has besides its arena, whatever the arena's size
        own = settled([each.pid for each in small])
        before = at_rest(services)
        large = [hold(size) for _ in range(_HOLDERS)]
        daemons.estimate_savings(cluster.cluster.hosts[0])
        pids = [each.pid for each in large]
        peak = Peak([*pids, *services], cluster.store(cluster.cluster.hosts[0].name))
        held = peak.held()
        with peak:
            report = large[0].call("share")
        if report["unique"] > 0 or report["shared"] < size // PAGE:
            raise RuntimeError(f"not all was shared: {report}")
        books = at_rest(services) - before + settled(pids) - own
        return books / (_HOLDERS * size / PAGE), (peak.bytes - held) / (1 << 20)


async def measure(size: int, runs: int) -> list[Record]:
    """A fresh host each time."""
    figures = []
    for _ in range(runs):
        async with host() as cluster:
            figures.append(await asyncio.to_thread(one_run, cluster, size))
    books, extra = (median(values) for values in zip(*figures, strict=True))
    assert books is not None and extra is not None
    what = f"{_HOLDERS} x {size >> 20} MiB shared"
    return [
        Record(
            "memory",
            f"{what}: books of all processes",
            "% of the arenas",
            None,
            100 * books / PAGE,
            "",
            runs,
            Aim("<=", 0.8),
        ),
        Record(
            "memory", f"{what}: extra while merging", "MiB", None, extra, "", runs, Aim("<=", 8)
        ),
    ]
