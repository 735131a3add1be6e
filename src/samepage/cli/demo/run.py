"""The demo itself, on a cluster that serves: load, measure, share, measure, write, check."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from rich.progress import Progress, TaskID

from samepage import host as merger
from samepage.cli import daemons
from samepage.cli.demo import measure, report
from samepage.cli.demo.cluster import DemoCluster
from samepage.cli.demo.files import Input
from samepage.cli.demo.workers import WorkerProcess
from samepage.cli.places import Host
from samepage.errors import ServiceUnavailableError
from samepage.reports import PAGE_SIZE

HOSTS = 2
WORKERS = 3
_SHARE_SECONDS = 60.0
_ROUNDS_MAX = 5
_POLL_SECONDS = 0.25
_OVERLAP_SECONDS = 15.0
_SETTLED_SECONDS = 1.5
_CHANGE = "written by one worker alone"
_CHANGED_PAGES = 64

T = TypeVar("T")


class Demo:
    """One run."""

    def __init__(self, cluster: DemoCluster, inputs: list[Input], progress: Progress) -> None:
        self._cluster = cluster
        self._hosts = cluster.cluster.hosts
        self._inputs = inputs
        self._progress = progress
        self._workers: list[WorkerProcess] = []

    async def run(self) -> report.Report:
        """Do everything, and end the workers.

        Raises:
            WorkerError: a worker failed.
            ServiceUnavailableError: a daemon is away.
        """
        try:
            await self._load()
            before = await self._memory()
            sharing = await self._share()
            after = await self._memory()
            overlap = await self._overlap()
            write, checks = await self._write_and_check()
        finally:
            await asyncio.gather(*(worker.stop() for worker in self._workers))
        hosts = [
            report.HostReport(host.name, WORKERS, before[host.name], after[host.name])
            for host in self._hosts
        ]
        return report.Report(self._inputs, hosts, sharing, overlap, write, checks)

    async def _load(self) -> None:
        total = sum(file.size for file in self._inputs) * WORKERS
        for host in self._hosts:
            task = self._progress.add_task(f"{host.name} loads", total=total)
            for number in range(1, WORKERS + 1):
                worker = WorkerProcess(host, f"worker-{number}", self._advance(task))
                self._workers.append(worker)
        await _together(worker.start(self._inputs) for worker in self._workers)

    def _advance(self, task: TaskID) -> Callable[[int], None]:
        return lambda count: self._progress.advance(task, count)

    async def _memory(self) -> dict[str, measure.Memory]:
        found = {}
        for host in self._hosts:
            pids = [worker.pid for worker in self._workers if worker.host is host]
            store = self._cluster.store(host.name)
            found[host.name] = await asyncio.to_thread(measure.memory, pids, store)
        return found

    async def _share(self) -> report.Sharing:
        """Have all workers share at once, again while that still merges a lot."""
        watch = asyncio.create_task(self._watch())
        (before, _), began = await self._costs(), time.monotonic()
        try:
            for _ in range(_ROUNDS_MAX):
                answers = await _together(
                    worker.do("share", timeout=_SHARE_SECONDS) for worker in self._workers
                )
                reports = [answer["report"] for answer in answers]
                gained = sum(one["merged"] for one in reports)
                if gained * 100 <= sum(one["pages"] for one in reports):
                    break
            wall = time.monotonic() - began
        finally:
            watch.cancel()
            await asyncio.wait({watch})
        after, shared = await self._costs()
        return report.Sharing(wall, {part: after[part] - before[part] for part in after}, shared)

    async def _watch(self) -> None:
        """Move the bars as the mergers' books say, until cancelled."""
        pages = sum(-(-file.size // PAGE_SIZE) for file in self._inputs) * WORKERS
        tasks = [
            self._progress.add_task(f"{host.name} shares", total=pages) for host in self._hosts
        ]
        try:
            while True:
                await self._update(tasks)
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            for task in tasks:
                self._progress.update(task, completed=pages)

    async def _update(self, tasks: list[TaskID]) -> None:
        for host, task in zip(self._hosts, tasks, strict=True):
            with contextlib.suppress(ServiceUnavailableError):
                arenas = await asyncio.to_thread(merger.list_arenas, str(host.directory))
                self._progress.update(task, completed=sum(one.shared_pages for one in arenas))

    async def _costs(self) -> tuple[dict[str, float], int]:
        """CPU seconds by part so far, and the pages that are shared now.

        The agents' part is that of the workers, without what their rewriting takes.
        """
        answers = await _together(worker.do("stats") for worker in self._workers)
        used = {"agents": sum(answer["cpu_seconds"] for answer in answers)}
        for name, pid in self._cluster.pids().items():
            part = {"merger": "mergers", "scanner": "scanners"}.get(name.rpartition("/")[2], name)
            used[part] = used.get(part, 0.0) + measure.cpu_seconds(pid)
        return used, sum(answer["stats"]["shared"] for answer in answers)

    async def _overlap(self) -> report.OverlapReport:
        """Ask the first host's scanner until the index has all, that is, its answer settles."""
        first, second = self._hosts
        task = self._progress.add_task("index learns", total=None)
        deadline = time.monotonic() + _OVERLAP_SECONDS
        last, since = (0, 0), time.monotonic()
        while (now := time.monotonic()) < deadline:
            current = await asyncio.to_thread(_overlap, first, second)
            if current != last:
                last, since = current, now
            elif current[0] and now - since > _SETTLED_SECONDS:
                break
            await asyncio.sleep(_POLL_SECONDS)
        self._progress.update(task, total=1, completed=1)
        return report.OverlapReport(first.name, second.name, *last)

    async def _write_and_check(self) -> tuple[report.WriteReport, list[report.Checked]]:
        writer, changed_file = self._workers[0], max(self._inputs, key=lambda file: file.size)
        pages = min(_CHANGED_PAGES, max(1, changed_file.size // PAGE_SIZE))
        before = (await writer.do("stats"))["stats"]["shared"]
        await writer.do("write", offset=changed_file.offset, pages=pages, change=_CHANGE)
        private = before - (await writer.do("stats"))["stats"]["shared"]
        task = self._progress.add_task("checking", total=len(self._workers) + 1)
        original = await asyncio.to_thread(lambda: [file.digest() for file in self._inputs])
        written = list(original)
        written[self._inputs.index(changed_file)] = changed_file.digest(_CHANGE.encode(), pages)
        self._progress.advance(task)
        checks, changed = [], []
        for worker in self._workers:
            answer = await worker.do("check")
            expected = written if worker is writer else original
            equal = answer["digests"] == expected
            checks.append(report.Checked(worker.full_name, equal, answer["own_intact"]))
            if answer["digests"] != original:
                changed.append(worker.full_name)
            self._progress.advance(task)
        wrote = report.WriteReport(writer.full_name, pages, max(0, private), tuple(changed))
        return wrote, checks


def _overlap(first: Host, second: Host) -> tuple[int, int]:
    found = daemons.overlap(first)
    return found.hosts.get(second.name, 0), found.distinct_pages


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all to their end, then raise the first error, if any."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
