"""What sharing and cloning spend their processor time on: `python -m bench.profiled MIB RUN`.

Two processes share MIB of memory with runs of RUN equal pages (0: all equal), while `perf`
(Debian's linux-perf) samples both and all daemons. Printed, in % of all samples: each kind of
thread, and which system calls or functions of its own it was in. With `--python` instead, `py-spy`
samples the merger, and its Python functions are printed; with `--writer`, `perf` samples just a
process that writes other pages of its arena meanwhile.

`python -m bench.profiled MIB clone` clones an arena of MIB to another host instead, and one that is
90 % equal to it: printed is the processor time of each process for each MiB, and then what `perf`
sampled in both mergers; with `--python`, what `py-spy` did in the destination's, with
`--python-source` in the source's. `--times` samples nothing, which costs time itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench.holding import Holder, host, sockets
from bench.hosts import (
    DESTINATION,
    EQUAL_PART,
    SOURCE,
    WARMING_BYTES,
    TwoHosts,
    clone_run,
    two_hosts,
)
from samepage.cli.cluster import LocalCluster

# perf and py-spy do not say when they have begun.
_BEGIN_SECONDS = 1.5
_WRITING_SECONDS = 10.0
_SHOWN = 12
_SHOWN_PERCENT = 0.5
_SHOWN_MS = 0.05
# What says more than the system call that it is a part of.
_PARTS = ("userfaultfd_register", "userfaultfd_unregister", "move_pages", "mwriteprotect_range")
_CALL = re.compile(r"__(x64_|do_)?sys_|ksys_|asm_exc_page")
_FRAME = re.compile(r"\s*([0-9a-f]+) (.*) \((.*)\)$")
_KERNEL = "ffffffff"

Tool = Callable[[Sequence[int], Path], list[str]]


def perf_command(pids: Sequence[int], out: Path) -> list[str]:
    """Sample processes."""
    options = ["-q", "-F", "2000", "-e", "cpu-clock", "-g", "-o", str(out)]
    return ["perf", "record", *options, "-p", ",".join(map(str, pids))]


def py_spy_command(pids: Sequence[int], out: Path) -> list[str]:
    """Sample the Python of a process."""
    options = ["--nonblocking", "-r", "500", "-f", "raw", "-o", str(out)]
    return ["py-spy", "record", *options, "-p", *map(str, pids)]


@contextmanager
def profiled(command: Sequence[str]) -> Iterator[None]:
    """Let a profiler run meanwhile."""
    profiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(_BEGIN_SECONDS)
        yield
    finally:
        profiler.send_signal(signal.SIGINT)
        profiler.wait()


def record(cluster: LocalCluster, size: int, run: int, what: str, out: Path) -> None:
    """Share while a profiler looks on."""
    tool: Tool = py_spy_command if what == "--python" else perf_command
    with ExitStack() as stack:
        holders = [
            stack.enter_context(Holder("arena", size, run, directory=sockets(cluster)))
            for _ in range(2)
        ]
        pids = cluster.pids()
        merger = next(pid for name, pid in pids.items() if name.endswith("merger"))
        everyone = [*pids.values(), *(holder.pid for holder in holders)]
        watched = {"--python": [merger], "--writer": [holders[0].pid]}.get(what, everyone)
        if what == "--writer":
            holders[0].start("write", _WRITING_SECONDS)
        with profiled(tool(watched, out)):
            report = holders[1].call("share")
        print(f"{report['shared']} pages shared in {report['end'] - report['start']:.2f} s")


@dataclass(frozen=True)
class Spent:
    """Milliseconds of processor time of each process so far, by its name."""

    by_process: dict[str, float]

    @classmethod
    def now(cls, pids: Mapping[str, int]) -> Spent:
        """Of processes that run."""
        tick = 1000 / os.sysconf("SC_CLK_TCK")
        spent = {}
        for name, pid in pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            spent[name] = (int(fields[11]) + int(fields[12])) * tick
        return cls(spent)

    def show(self, since: Spent, mib: int) -> None:
        """Print what was spent for each MiB; processes with next to nothing are left out."""
        for name, spent in self.by_process.items():
            each = (spent - since.by_process[name]) / mib
            if each >= _SHOWN_MS:
                print(f"    {each:5.2f} ms a MiB  {name}")


def record_clones(hosts: TwoHosts, size: int, what: str, out: Path) -> None:
    """Clone while a profiler looks on."""
    clone_run(hosts, WARMING_BYTES, 0)
    pids = hosts.cluster.pids()
    mergers = [pids[f"{name}/merger"] for name in (SOURCE, DESTINATION)]
    watched = {"--python": mergers[1:], "--python-source": mergers[:1]}.get(what, mergers)
    tool: Tool = py_spy_command if what else perf_command
    looking_on = nullcontext() if what == "--times" else profiled(tool(watched, out))
    with hosts.holder(DESTINATION, "copies", size) as copies, looking_on:
        for part in (1.0, 1.0 - EQUAL_PART):
            with hosts.holder(SOURCE, "arena", size) as source:
                if part < 1.0:
                    source.call("renew", part)
                everyone = {**pids, "the source's application": source.pid}
                everyone["the destination's application"] = copies.pid
                before = Spent.now(everyone)
                seconds = copies.call("clone", f"{SOURCE}/{source.call('name')}")
                print(f"{size / (1 << 30) / seconds:.3f} GiB/s, {1 - part:.0%} there already:")
                Spent.now(everyone).show(before, size >> 20)


def perf_samples(out: Path, *, by_library: bool = False) -> Iterator[tuple[str, str]]:
    """The thread's name of each sample, and what it was doing; `by_library` tells of what is not
    the kernel's only in which library it was."""
    command = ["perf", "script", "-i", str(out), "-F", "comm,ip,sym,dso"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for sample in text.split("\n\n"):
        name, *frames = sample.strip().split("\n")
        places = [match.groups() for frame in frames if (match := _FRAME.match(frame))]
        kernel = [symbol for address, symbol, _ in places if address.startswith(_KERNEL)]
        user = [
            Path(library).name if by_library else symbol
            for address, symbol, library in places
            if not address.startswith(_KERNEL)
        ]
        part = next((symbol for symbol in kernel if symbol in _PARTS), "")
        call = next((symbol for symbol in kernel if _CALL.match(symbol)), "")
        if places:
            yield name.strip(), part or call or (user[0] if user else "?")


def py_spy_samples(out: Path) -> Iterator[tuple[str, str]]:
    """The innermost function of the merger's own in each sample of its event loop."""
    for line in out.read_text().splitlines():
        stack, _, times = line.rpartition(" ")
        own = [frame for frame in stack.split(";") if "samepage" in frame]
        if "_run_once" in stack and "select (" not in stack.split(";")[-1] and own:
            yield from [("merger", re.sub(r":\d+\)$", ")", own[-1]))] * int(times)


def show(samples: Sequence[tuple[str, str]]) -> None:
    """Shares of threads, and of what they do."""
    print(f"{len(samples)} samples")
    for name, count in Counter(name for name, _ in samples).most_common():
        if 100 * count < _SHOWN_PERCENT * len(samples):
            continue
        print(f"{100 * count / len(samples):5.1f} %  {name}")
        what = Counter(what for thread, what in samples if thread == name)
        for part, times in what.most_common(_SHOWN):
            if 100 * times >= _SHOWN_PERCENT * len(samples):
                print(f"         {100 * times / len(samples):5.1f} %  {part}")


async def main(size: int, run: str, what: str) -> None:
    """Measure and print."""
    tool = "py-spy" if what.startswith("--python") else "perf"
    if shutil.which(tool) is None:
        sys.exit(f"this needs {tool}: install py-spy from PyPI, linux-perf from Debian")
    with tempfile.TemporaryDirectory(prefix="samepage-profile-") as directory:
        out = Path(directory) / "samples"
        if run == "clone":
            async with two_hosts() as hosts:
                await asyncio.to_thread(record_clones, hosts, size, what, out)
        else:
            async with host() as cluster:
                await asyncio.to_thread(record, cluster, size, int(run), what, out)
        if what == "--times":
            return
        if tool == "py-spy":
            show(list(py_spy_samples(out)))
        else:
            show(list(perf_samples(out, by_library=run == "clone")))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) << 20, sys.argv[2], "".join(sys.argv[3:4])))
