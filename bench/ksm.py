"""Reclaiming 2 x N bytes of equal memory: this project against kernel samepage merging.

Both get two processes with the same bytes and are measured until the second copy is gone: wall
time, and the processor time of everything that takes part (for this project both daemons, the
index and the applications' agents; for the kernel ksmd). KSM runs flat out: as many pages at a
time as it likes, no pauses. Runs alternate, medians are told.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass

from bench import kernel
from bench.holding import Holder, equal_pages, host, say, sockets
from bench.record import Aim, Record, median
from samepage.cli.cluster import LocalCluster

_POLL_SECONDS = 0.005
_KSM_SECONDS_MAX = 300.0
_RUNS_FROM = 64
PEER = "ksm flat out"


@dataclass(frozen=True)
class Run:
    """One measured run. `reclaimed` in bytes, as the kernel tells."""

    wall: float
    cpu: float
    reclaimed: int


def ksm_run(size: int, run: int) -> Run:
    """Let the kernel merge two processes' memory."""
    thread = kernel.thread_named("ksmd")
    if thread is None:
        raise RuntimeError("no ksmd runs, though /sys/kernel/mm/ksm is there")
    wanted = equal_pages(size, run) * 99 // 100
    with ExitStack() as stack:
        # what ended processes shared counts until KSM is told to let go
        stack.callback((kernel.KSM / "run").write_text, "2")
        pids = [stack.enter_context(Holder("ksm", size, run)).pid for _ in range(2)]
        stack.callback((kernel.KSM / "run").write_text, "0")
        before, cpu, start = kernel.pss(pids), kernel.cpu_seconds([thread]), time.monotonic()
        (kernel.KSM / "run").write_text("1")
        while kernel.ksm_value("pages_sharing") < wanted:
            if time.monotonic() - start > _KSM_SECONDS_MAX:
                raise RuntimeError(f"KSM did not merge {wanted} pages in {_KSM_SECONDS_MAX} s")
            time.sleep(_POLL_SECONDS)
        wall, cpu = time.monotonic() - start, kernel.cpu_seconds([thread]) - cpu
        (kernel.KSM / "run").write_text("0")
        return Run(wall, cpu, before - kernel.pss(pids))


def arena_run(cluster: LocalCluster, size: int, run: int) -> Run:
    """Share two processes' arenas."""
    with ExitStack() as stack:
        holders = [
            stack.enter_context(Holder("arena", size, run, directory=sockets(cluster)))
            for _ in range(2)
        ]
        applications = [holder.pid for holder in holders]
        everyone = [*applications, *cluster.pids().values()]
        # a page of the store counts in the Pss of those that map it
        before = kernel.pss(applications)
        cpu = kernel.cpu_seconds(everyone)
        report = holders[0].call("share")
        cpu = kernel.cpu_seconds(everyone) - cpu
        after = kernel.pss(applications)
        if report["shared"] < equal_pages(size, run) * 99 // 100:
            raise RuntimeError(f"not all was shared: {report}")
        return Run(report["end"] - report["start"], cpu, before - after)


async def measure(size: int, run: int, runs: int) -> list[Record]:
    """Both, alternating."""
    ours: list[Run] = []
    theirs: list[Run] = []
    with ExitStack() as stack:
        obstacle = kernel.ksm_obstacle()
        if obstacle is None:
            stack.enter_context(kernel.ksm_flat_out())
        else:
            say(f"measuring without the peer: {obstacle}")
        async with host() as cluster:
            for _ in range(runs):
                ours.append(await asyncio.to_thread(arena_run, cluster, size, run))
                if obstacle is None:
                    theirs.append(await asyncio.to_thread(ksm_run, size, run))
    kind = {0: "all equal", 1: "single pages"}.get(run, f"runs of {run} pages")
    name = f"2 x {size >> 20} MiB, {kind}"
    is_long = run == 0 or run >= _RUNS_FROM

    def record(
        what: str, unit: str, field: str, aim: Aim | None = None, scale: float = 1.0
    ) -> Record:
        mine = median([getattr(run, field) * scale for run in ours])
        peer = median([getattr(run, field) * scale for run in theirs])
        assert mine is not None
        return Record("ksm", f"{name}: {what}", unit, peer, mine, PEER, runs, aim)

    return [
        record("wall", "s", "wall", Aim("<=", 0.25 if is_long else 1.0)),
        record("processor time", "s", "cpu", Aim("<=", 0.2 if is_long else 1.0)),
        record("reclaimed", "MiB", "reclaimed", scale=1 / (1 << 20)),
    ]
