"""A process that holds equal memory, for `bench.ksm`: `python -m bench.holder KIND BYTES RUN`.

KIND is `arena` (an arena of the daemons in $SAMEPAGE_DIR) or `ksm` (plain memory that the kernel
may merge). Every holder has the same bytes, but for one page of its own after each RUN equal ones
(0: all are equal). It says `ready` when they are there; a line `share` shares an arena and answers
with the report; the end of standard input ends it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np

import samepage

PAGE = 4096
_MADV_MERGEABLE = 12


def fill(memory: memoryview, run: int) -> None:
    """Write the bytes that every holder has, then a page of its own after each run."""
    words = np.frombuffer(memory, np.uint64)
    step = 1 << 20
    same = np.random.default_rng(1)
    for start in range(0, words.size, step):
        part = words[start : start + step]
        part[:] = same.integers(0, 2**64, part.size, np.uint64)
    if run:
        pages = words.reshape(-1, PAGE // 8)[run :: run + 1]
        pages[:, 0] = np.frombuffer(os.urandom(8 * len(pages)), np.uint64)


@contextmanager
def plain(size: int) -> Iterator[tuple[memoryview, None]]:
    """Anonymous private memory that the kernel's samepage merging may look at."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_MERGEABLE)
    yield memoryview(memory), None


@contextmanager
def arena(size: int) -> Iterator[tuple[memoryview, samepage.Arena]]:
    """An arena."""
    with samepage.connect() as node, node.create_arena(f"bench-{os.getpid()}", size) as made:
        yield made.buffer, made


def main() -> None:
    """Hold memory until standard input ends."""
    kind, size, run = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with (arena if kind == "arena" else plain)(size) as (memory, made):
        fill(memory, run)
        print("ready", flush=True)
        for _ in sys.stdin:
            if made is None:
                continue
            start = time.monotonic()
            report = made.share(timeout=300.0)
            seconds = time.monotonic() - start
            print(json.dumps({"seconds": seconds, **asdict(report)}), flush=True)


if __name__ == "__main__":
    main()
