"""A process that holds memory for a benchmark: `python -m bench.holder KIND BYTES RUN SEED`.

KIND is `arena` (an arena of the daemons in $SAMEPAGE_DIR) or `ksm` (plain memory that the kernel
may merge). Holders of one seed have the same bytes, but for one page of its own after each RUN
equal ones (0: all are equal). An arena has OWN_BYTES more that nobody else has.

It says "ready" when the bytes are there; then each line on standard input is a call of `Commands`
as a JSON list, answered by a line of JSON. The end of standard input ends it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

import samepage

PAGE = 4096
OWN_BYTES = 64 << 20
STROKE_BYTES = 4 << 20
_MADV_MERGEABLE = 12
_STALL_NS = 10_000


def fill(memory: memoryview, run: int, seed: int) -> None:
    """Write the bytes that every holder has, then a page of its own after each run."""
    words = np.frombuffer(memory, np.uint64)
    step = 1 << 14  # small, so that the process keeps nothing of it
    same = np.random.default_rng(seed)
    for start in range(0, words.size, step):
        part = words[start : start + step]
        part[:] = same.integers(0, 2**64, part.size, np.uint64)
    if run:
        pages = words.reshape(-1, PAGE // 8)[run :: run + 1]
        pages[:, 0] = np.frombuffer(os.urandom(8 * len(pages)), np.uint64)


class Commands:
    """What a holder can be told. Times are CLOCK_MONOTONIC, in seconds."""

    def __init__(self, memory: memoryview, size: int, arena: samepage.Arena | None) -> None:
        self._memory = memory
        self._size = size
        self._arena = arena

    def share(self) -> dict[str, Any]:
        """Share the arena; the report, with when it began and ended."""
        assert self._arena is not None
        start = time.monotonic()
        report = self._arena.share(timeout=300.0)
        return {"start": start, "end": time.monotonic(), **asdict(report)}

    def unshare(self) -> None:
        """Make every page private again."""
        assert self._arena is not None
        self._arena.unshare()

    def write(self, seconds: float) -> list[tuple[float, float]]:
        """Write one's own bytes over and over.

        Returns:
            After each STROKE_BYTES: the time, and the processor time of this thread so far.
        """
        own = (ctypes.c_char * OWN_BYTES).from_buffer(self._memory, self._size)
        address, end = ctypes.addressof(own), time.monotonic() + seconds
        strokes = [(time.monotonic(), time.thread_time())]
        while strokes[-1][0] < end:
            offset = len(strokes) * STROKE_BYTES % OWN_BYTES
            ctypes.memset(address + offset, len(strokes) & 0xFF, STROKE_BYTES)
            strokes.append((time.monotonic(), time.thread_time()))
        return strokes

    def touch(self, seconds: float) -> list[int]:
        """Write to pages that others have too, one byte each that was there already.

        Returns:
            How long each write took that took longer than 10 us, in nanoseconds.
        """
        memory, clock, pages = self._memory, time.perf_counter_ns, self._size // PAGE
        offsets = [PAGE * random.randrange(pages) for _ in range(1 << 16)]
        stalls, end = [], clock() + int(seconds * 1e9)
        before = clock()
        while before < end:
            for offset in offsets:
                byte = memory[offset]
                before = clock()
                memory[offset] = byte
                took = clock() - before
                if took > _STALL_NS:
                    stalls.append(took)
        return stalls


@contextmanager
def plain(size: int) -> Iterator[tuple[memoryview, None]]:
    """Anonymous private memory that the kernel's samepage merging may look at."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_MERGEABLE)
    yield memoryview(memory), None


@contextmanager
def arena(size: int) -> Iterator[tuple[memoryview, samepage.Arena]]:
    """An arena."""
    name = f"bench-{os.getpid()}"
    with samepage.connect() as node, node.create_arena(name, size + OWN_BYTES) as made:
        yield made.buffer, made


def main() -> None:
    """Hold memory until standard input ends."""
    kind, size, run, seed = sys.argv[1], *map(int, sys.argv[2:])
    with (arena if kind == "arena" else plain)(size) as (memory, made):
        fill(memory[:size], run, seed)
        print("ready", flush=True)
        commands = Commands(memory, size, made)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(commands, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
