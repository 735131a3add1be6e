"""A pass over an arena in which nothing was written, against the first pass over it.

One process holds pages that nobody else has, so that there is nothing to merge: share() is then
one pass, and its answer. The first look at an arena takes place in a share() too: background
passes are too far apart to come before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bench import kernel
from bench.holding import Holder, host, sockets
from bench.record import Aim, Record, median
from samepage.cli.cluster import LocalCluster

PEER = "the first pass"
_REPEATED = 5

Cost = tuple[float, float]


def one_run(cluster: LocalCluster, size: int) -> tuple[Cost, Cost]:
    """Wall and processor seconds of the first pass, and of a later one."""
    with Holder("arena", size, directory=sockets(cluster)) as holder:
        everyone = [holder.pid, *cluster.pids().values()]
        first = shares(holder, everyone, 1)
        shares(holder, everyone, 1)  # stability is known from here on
        return first, shares(holder, everyone, _REPEATED)


def shares(holder: Holder, everyone: Sequence[int], times: int) -> Cost:
    """Wall and processor seconds of one share(), the mean of several."""
    cpu, wall = kernel.cpu_seconds(everyone), 0.0
    for _ in range(times):
        report = holder.call("share")
        wall += report["end"] - report["start"]
    return wall / times, (kernel.cpu_seconds(everyone) - cpu) / times


async def measure(size: int, runs: int) -> list[Record]:
    """Fresh arenas, one after the other."""
    async with host() as cluster:
        costs = [await asyncio.to_thread(one_run, cluster, size) for _ in range(runs)]
    records = []
    for number, what in enumerate(("wall", "processor time")):
        later = median([unchanged[number] for _, unchanged in costs])
        assert later is not None
        first = median([first[number] for first, _ in costs])
        what = f"a pass over {size >> 20} MiB unchanged: {what}"
        records.append(Record("passes", what, "s", first, later, PEER, runs, Aim("<=", 0.1)))
    return records
