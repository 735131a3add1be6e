"""What an application feels while its memory is shared.

- Writing: one process writes its own pages over and over, in an arena whose other pages are being
  shared with another process; its speed meanwhile against its speed before.
- Stalls: one process writes single bytes to random pages that are being shared and restored; how
  long those writes took that took longer than 10 us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack

from bench.holder import STROKE_BYTES
from bench.holding import Holder, host, sockets
from bench.record import Aim, Record, median, percentile
from samepage.cli.cluster import LocalCluster

PEER = "the same writer, nothing shared"
_BEFORE_SECONDS = 1.0
_SECONDS = 6.0

Stroke = Sequence[float]


def speed(strokes: Sequence[Stroke], clock: int) -> float:
    """GB a second by the wall clock (0) or by the writer's own processor time (1)."""
    first, last = strokes[0], strokes[-1]
    return (len(strokes) - 1) * STROKE_BYTES / (last[clock] - first[clock]) / 1e9


def two_holders(stack: ExitStack, cluster: LocalCluster, size: int) -> list[Holder]:
    """Two processes with equal memory."""
    return [
        stack.enter_context(Holder("arena", size, directory=sockets(cluster))) for _ in range(2)
    ]


def writing_run(cluster: LocalCluster, size: int) -> tuple[list[float], list[float]]:
    """The writer's speed by both clocks: alone, and while its arena is shared."""
    with ExitStack() as stack:
        writer, other = two_holders(stack, cluster, size)
        alone = writer.call("write", _BEFORE_SECONDS)
        writer.start("write", _SECONDS)
        report = other.call("share")
        strokes = writer.finish()
        during = [s for s in strokes if report["start"] <= s[0] <= report["end"]]
        if len(during) < 2 or strokes[-1][0] < report["end"]:
            raise RuntimeError("the sharing did not fall into the writing: other sizes are needed")
        return [speed(alone, 0), speed(alone, 1)], [speed(during, 0), speed(during, 1)]


def stalls_run(cluster: LocalCluster, size: int) -> list[int]:
    """Stalls of a thread that writes where pages are shared and restored, in nanoseconds."""
    with ExitStack() as stack:
        writer, other = two_holders(stack, cluster, size)
        writer.start("touch", _SECONDS)
        for _ in range(3):
            other.call("share")
        stalls: list[int] = writer.finish()
        return stalls


async def measure_writing(size: int, runs: int) -> list[Record]:
    """Fresh arenas each time."""
    async with host() as cluster:
        figures = [await asyncio.to_thread(writing_run, cluster, size) for _ in range(runs)]
    records = []
    for clock, what in enumerate(("wall clock", "its own processor time")):
        alone = median([alone[clock] for alone, _ in figures])
        during = median([during[clock] for _, during in figures])
        assert during is not None
        name = f"writing other pages while 2 x {size >> 20} MiB are shared, by {what}"
        records.append(Record("running", name, "GB/s", alone, during, PEER, runs, Aim(">=", 0.95)))
    return records


async def measure_stalls(size: int, runs: int) -> list[Record]:
    """Fresh arenas each time; percentiles of each run, then their median."""
    async with host() as cluster:
        figures = [await asyncio.to_thread(stalls_run, cluster, size) for _ in range(runs)]
    records = []
    for part, aim in ((0.5, None), (0.99, Aim("<=", 1.0))):
        ms = median([percentile(stalls, part) / 1e6 for stalls in figures])
        assert ms is not None
        name = f"stall of a write into 2 x {size >> 20} MiB being shared, p{part * 100:.0f}"
        records.append(Record("running", name, "ms", None, ms, "", runs, aim))
    return records
