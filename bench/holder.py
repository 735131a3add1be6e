"""A process that holds memory for a benchmark: `python -m bench.holder KIND BYTES RUN SEED`.

KIND is `arena` (an arena of the daemons in $SAMEPAGE_DIR), `ksm` (plain memory that the kernel may
merge) or `copies` (nothing but the arenas that it clones). Holders of one seed have the same bytes,
but for one page of its own after each RUN equal ones (0: all are equal).
An arena has OWN_BYTES more that nobody else has.

It says "ready" when the bytes are there; then each line on standard input is a call of `Commands`
as a JSON list, answered by a line of JSON. The end of standard input ends it.
"""

from __future__ import annotations

import ctypes
import hashlib
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

    def __init__(
        self,
        memory: memoryview,
        size: int,
        arena: samepage.Arena | None,
        node: samepage.Node | None,
    ) -> None:
        self._memory = memory
        self._size = size
        self._arena = arena
        self._node = node
        self._copies: list[samepage.Arena] = []

    def name(self) -> str:
        """The arena's name."""
        assert self._arena is not None
        return self._arena.name

    def renew(self, part: float) -> None:
        """Write new bytes into the first part (0 to 1) of what others have too."""
        size = round(self._size * part)
        self._memory[:size] = np.random.default_rng().bytes(size)

    def digest(self) -> str:
        """SHA-256 of the arena, or of the latest copy."""
        view = self._copies[-1].buffer if self._copies else self._memory
        return hashlib.sha256(view[: self._size]).hexdigest()

    def clone(self, source: str) -> float:
        """Clone an arena of another host, and keep it; how many seconds that took."""
        assert self._node is not None
        start = time.perf_counter()
        self._copies.append(self._node.clone_arena(source))
        return time.perf_counter() - start

    def drop_copies(self) -> None:
        """End all copies."""
        while self._copies:
            self._copies.pop().close()

    def evict(self) -> dict[str, int]:
        """Evict what others have too; the report."""
        assert self._arena is not None
        return asdict(self._arena.evict(0, self._size))

    def fetch(self) -> None:
        """Bring back what was evicted."""
        assert self._arena is not None
        self._arena.fetch(0, self._size)

    def touch_once(self, count: int) -> list[int]:
        """Read a byte of so many different pages, in random order; nanoseconds of each."""
        memory, clock, took = self._memory, time.perf_counter_ns, []
        for page in random.sample(range(self._size // PAGE), count):
            before = clock()
            memory[page * PAGE]
            took.append(clock() - before)
        return took

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
        """Write one's own bytes over and over, no page like another, so that none is shared.

        Returns:
            After each STROKE_BYTES: the time, and the processor time of this thread so far.
        """
        own = (ctypes.c_char * OWN_BYTES).from_buffer(self._memory, self._size)
        address = ctypes.addressof(own)
        ctypes.memset(address, 1, OWN_BYTES)  # so that the memory is there
        end = time.monotonic() + seconds
        ink = ctypes.create_string_buffer(os.urandom(STROKE_BYTES + PAGE))
        strokes = [(time.monotonic(), time.thread_time())]
        while strokes[-1][0] < end:
            offset = len(strokes) * STROKE_BYTES % OWN_BYTES
            shift = len(strokes) * 8 % PAGE
            ctypes.memmove(address + offset, ctypes.addressof(ink) + shift, STROKE_BYTES)
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
def plain(size: int, run: int, seed: int) -> Iterator[Commands]:
    """Anonymous private memory that the kernel's samepage merging may look at."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_MERGEABLE)
    fill(memoryview(memory), run, seed)
    yield Commands(memoryview(memory), size, None, None)


@contextmanager
def arena(size: int, run: int, seed: int) -> Iterator[Commands]:
    """An arena."""
    name = f"bench-{os.getpid()}"
    with samepage.connect() as node, node.create_arena(name, size + OWN_BYTES) as made:
        fill(made.buffer[:size], run, seed)
        yield Commands(made.buffer, size, made, None)


@contextmanager
def copies(size: int, run: int, seed: int) -> Iterator[Commands]:
    """No memory of its own."""
    with samepage.connect() as node:
        yield Commands(memoryview(b""), size, None, node)


KINDS = {"arena": arena, "copies": copies, "ksm": plain}


def main() -> None:
    """Hold memory until standard input ends."""
    kind, size, run, seed = sys.argv[1], *map(int, sys.argv[2:])
    with KINDS[kind](size, run, seed) as commands:
        print("ready", flush=True)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(commands, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
