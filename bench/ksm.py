"""Reclaiming 2 x N bytes of equal memory: this project against kernel samepage merging.

Both get two processes with the same bytes and are measured until the second copy is gone: wall
time, and the processor time of everything that takes part (for this project both daemons, the
index and the applications' agents; for the kernel ksmd). KSM runs flat out: as many pages at a
time as it likes, no pauses. Runs alternate, medians are told.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import kernel
from bench.holder import PAGE
from bench.record import Record, median
from samepage.cli.cluster import LocalCluster

_POLL_SECONDS = 0.005
_KSM_SECONDS_MAX = 300.0
PEER = "ksm flat out"


@dataclass(frozen=True)
class Run:
    """One measured run. `reclaimed` in bytes, as the kernel tells."""

    wall: float
    cpu: float
    reclaimed: int


@contextmanager
def holder(kind: str, size: int, run: int, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the memory, ready."""
    command = [sys.executable, "-m", "bench.holder", kind, str(size), str(run)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)} did not become ready")
        yield process
    finally:
        process.stdin.close()
        process.wait()


def equal_pages(size: int, run: int) -> int:
    """Pages of one copy that the other has too."""
    pages = size // PAGE
    return pages if run == 0 else pages - len(range(run, pages, run + 1))


def ksm_run(size: int, run: int, env: dict[str, str]) -> Run:
    """Let the kernel merge two processes' memory."""
    thread = kernel.thread_named("ksmd")
    if thread is None:
        raise RuntimeError("no ksmd runs, though /sys/kernel/mm/ksm is there")
    wanted = equal_pages(size, run) * 99 // 100
    with ExitStack() as stack:
        # what ended processes shared counts until KSM is told to let go
        stack.callback((kernel.KSM / "run").write_text, "2")
        pids = [stack.enter_context(holder("ksm", size, run, env)).pid for _ in range(2)]
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


def arena_run(cluster: LocalCluster, size: int, run: int, env: dict[str, str]) -> Run:
    """Share two processes' arenas."""
    host = cluster.cluster.hosts[0]
    env = {**env, "SAMEPAGE_DIR": str(host.directory)}
    with ExitStack() as stack:
        holders = [stack.enter_context(holder("arena", size, run, env)) for _ in range(2)]
        applications = [process.pid for process in holders]
        everyone = [*applications, *cluster.pids().values()]
        # a page of the store counts in the Pss of those that map it
        before = kernel.pss(applications)
        cpu = kernel.cpu_seconds(everyone)
        first = holders[0]
        assert first.stdin is not None and first.stdout is not None
        first.stdin.write("share\n")
        first.stdin.flush()
        report = json.loads(first.stdout.readline())
        cpu = kernel.cpu_seconds(everyone) - cpu
        after = kernel.pss(applications)
        if report["shared"] < equal_pages(size, run) * 99 // 100:
            raise RuntimeError(f"not all was shared: {report}")
        return Run(report["seconds"], cpu, before - after)


async def measure(size: int, run: int, runs: int, env: dict[str, str]) -> list[Record]:
    """Both, alternating."""
    ours: list[Run] = []
    theirs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="samepage-bench-") as directory, ExitStack() as stack:
        obstacle = kernel.ksm_obstacle()
        if obstacle is None:
            stack.enter_context(kernel.ksm_flat_out())
        else:
            print(f"measuring without the peer: {obstacle}", file=sys.stderr)
        async with LocalCluster(Path(directory), 1, lambda text: print(text, file=sys.stderr)) as c:
            for _ in range(runs):
                ours.append(await asyncio.to_thread(arena_run, c, size, run, env))
                if obstacle is None:
                    theirs.append(await asyncio.to_thread(ksm_run, size, run, env))
    name = f"2 x {size >> 20} MiB, " + (f"runs of {run} pages" if run else "all equal")

    def record(what: str, unit: str, field: str, scale: float = 1.0) -> Record:
        mine = median([getattr(run, field) * scale for run in ours])
        peer = median([getattr(run, field) * scale for run in theirs])
        assert mine is not None
        return Record("ksm", f"{name}: {what}", unit, peer, mine, PEER, runs)

    return [
        record("wall", "s", "wall"),
        record("processor time", "s", "cpu"),
        record("reclaimed", "MiB", "reclaimed", 1 / (1 << 20)),
    ]
