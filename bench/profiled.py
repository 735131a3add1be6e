"""What sharing spends its processor time on: `python -m bench.profiled MIB RUN`.

Two processes share MIB of memory with runs of RUN equal pages (0: all equal), while `perf`
(Debian's linux-perf) samples both and all daemons. Printed, in % of all samples: each kind of
thread, and which system calls or functions of its own it was in. With `--python` instead, `py-spy`
samples the merger, and its Python functions are printed; with `--writer`, `perf` samples just a
process that writes other pages of its arena meanwhile.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.holding import Holder, host, sockets
from samepage.cli.cluster import LocalCluster

# perf and py-spy do not say when they have begun.
_BEGIN_SECONDS = 1.5
_WRITING_SECONDS = 10.0
_SHOWN = 12
_SHOWN_PERCENT = 0.5
# What says more than the system call that it is a part of.
_PARTS = ("userfaultfd_register", "userfaultfd_unregister", "move_pages", "mwriteprotect_range")
_CALL = re.compile(r"__(x64|do)_sys_|asm_exc_page_fault|asm_sysvec")
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
        profiler = subprocess.Popen(
            tool(watched, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            time.sleep(_BEGIN_SECONDS)
            report = holders[1].call("share")
        finally:
            profiler.send_signal(signal.SIGINT)
            profiler.wait()
        print(f"{report['shared']} pages shared in {report['end'] - report['start']:.2f} s")


def perf_samples(out: Path) -> Iterator[tuple[str, str]]:
    """The thread's name of each sample, and what it was doing."""
    command = ["perf", "script", "-i", str(out), "-F", "comm,ip,sym"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for sample in text.split("\n\n"):
        name, *frames = sample.strip().split("\n")
        places = [[*frame.split(None, 1), "?"][:2] for frame in frames]
        kernel = [symbol for address, symbol in places if address.startswith(_KERNEL)]
        user = [symbol for address, symbol in places if not address.startswith(_KERNEL)]
        part = next((symbol for symbol in kernel if symbol in _PARTS), "")
        call = next(
            (symbol for symbol in kernel if re.match(r"__(x64|do)_sys_|asm_exc_page", symbol)), ""
        )
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


async def main(size: int, run: int, what: str) -> None:
    """Measure and print."""
    tool = "py-spy" if what == "--python" else "perf"
    if shutil.which(tool) is None:
        sys.exit(f"this needs {tool}: install py-spy from PyPI, linux-perf from Debian")
    with tempfile.TemporaryDirectory(prefix="samepage-profile-") as directory:
        out = Path(directory) / "samples"
        async with host() as cluster:
            await asyncio.to_thread(record, cluster, size, run, what, out)
        show(list(py_spy_samples(out) if tool == "py-spy" else perf_samples(out)))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) << 20, int(sys.argv[2]), "".join(sys.argv[3:4])))
