"""Fingerprinting, against reading the same memory once from one thread.

Both go over the same bytes, alternating: the peer is the C library's memchr for a byte that is not
there, which reads with the widest registers and does nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Iterator

import numpy as np

from bench.holder import PAGE
from bench.record import Aim, Record, median
from samepage import native

PEER = "memchr over the same memory"
_ABSENT = 0xFF


def measure(size: int, runs: int) -> Iterator[Record]:
    """Both, alternating, after one round to warm up."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words = np.frombuffer(memory, np.uint64)
    words[:] = np.random.default_rng(1).integers(0, 2**64, words.size, np.uint64)
    words &= np.uint64(0x7F7F7F7F7F7F7F7F)
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    address = words.ctypes.data

    def read() -> None:
        if find(address, _ABSENT, size) is not None:
            raise AssertionError("the byte is there, so not all was read")

    def fingerprint() -> None:
        native.fingerprint(memory, size // PAGE, 1)

    seconds: list[tuple[float, float]] = [
        (timed(read), timed(fingerprint)) for _ in range(runs + 1)
    ][1:]
    speeds = [[size / each[side] / 1e9 for each in seconds] for side in (0, 1)]
    peer, ours = (median(speed) for speed in speeds)
    assert ours is not None
    yield Record(
        "fingerprint",
        f"fingerprints of {size >> 20} MiB, one thread",
        "GB/s",
        peer,
        ours,
        PEER,
        runs,
        Aim(">=", 0.7),
    )


def timed(work: Callable[[], None]) -> float:
    """How long it takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
