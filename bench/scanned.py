"""The example of docs/scan.md: four processes that load the same data, scanned.

`python -m bench.scanned PICTURE` starts them, prints what `samepage scan` says, draws the picture,
and tells how fast memory is read and compared. Each process imports numpy, loads the libraries of
numpy as blobs, makes a table of words, and an array of its own.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from samepage.scan import compare, memory

PROCESSES = 4
WORKER = """
import glob, os, sys
import numpy
libraries = sorted(glob.glob(os.path.dirname(numpy.__file__) + "/**/*.so", recursive=True))
blobs = [open(path, "rb").read() for path in libraries]
words = {word: at for at, word in enumerate(numpy.__doc__.split() * 100)}
table = numpy.random.default_rng(7).integers(0, 1 << 60, 1 << 21)
own = numpy.random.default_rng(os.getpid()).integers(0, 1 << 60, 1 << 19)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def worker() -> Iterator[int]:
    """A process with data; its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdout.readline()
        yield process.pid
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def main(picture: Path) -> None:
    """Scan them as a user would, then time the parts."""
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(worker()) for _ in range(PROCESSES)]
        chosen = [word for pid in pids for word in ("--pid", str(pid))]
        command = [sys.executable, "-m", "samepage", "scan", *chosen, "--plot", str(picture)]
        subprocess.run(command, check=True)
        wanted = [mapping for pid in pids for mapping in memory.mappings(pid)]
        memory.read(wanted)  # once to warm up
        start = time.perf_counter()
        pages = memory.read(wanted)
        read = time.perf_counter()
        compare.report(pages, compare.compare(pages))
        compared = time.perf_counter()
        gib = len(pages.mapping) * memory.PAGE / (1 << 30)
        print(
            f"read {gib / (read - start):.1f} GiB/s, compared {gib / (compared - read):.1f} GiB/s"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
