"""Everything at once for as long as told: bytes stay right, and nothing grows.

Processes make arenas, fill, write, share, unshare, discard and close them, and are killed; in the
first part of the time daemons are killed too. In the second part nobody kills daemons, so that
their memory, descriptors and mappings can be followed: what they hold in the last third of it must
be what they held in the first. At the end all arenas are closed, and nothing may be left.

A short form runs with every test; `make soak` takes ten minutes (SAMEPAGE_SOAK_SECONDS).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.up import Up, running

from samepage.v1 import merger_pb2, merger_pb2_grpc

SECONDS = float(os.environ.get("SAMEPAGE_SOAK_SECONDS", "24"))
pytestmark = [
    pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap"),
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS + 300),
]

PROCESSES = 4  # the first is never killed
ARENAS_MAX = 12
PAGES_MAX = 1200
SEEDS = (1, 2, 3)  # of what arenas have in common
KILLING_PART = 0.4
SAMPLE_SECONDS = 0.5
# What a daemon's memory may differ by between the first and the last third: the heap's own
# ups and downs. A leak of a page a merge would be a hundred times that in ten minutes.
ALLOWED_BYTES = 6 << 20
DESCRIPTORS_ALLOWED = 8
AWAY = ("ServiceUnavailableError", "ShareTimeoutError", "NotRunningError")


@dataclass(frozen=True)
class Sample:
    """What one process holds: bytes of anonymous memory, open descriptors, mappings."""

    at: float
    name: str
    anonymous: int
    descriptors: int
    mappings: int


def sample(name: str, pid: int, began: float) -> Sample:
    """Look at a process."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    [line] = [line for line in rollup.splitlines() if line.startswith("Pss_Anon:")]
    return Sample(
        round(time.monotonic() - began, 2),
        name,
        int(line.split()[1]) * 1024,
        len(os.listdir(f"/proc/{pid}/fd")),
        len(Path(f"/proc/{pid}/maps").read_text().splitlines()),
    )


class Arena:
    """An arena and the bytes that it must hold."""

    def __init__(self, process: int, name: str, pages: int) -> None:
        self.process = process
        self.name = name
        self.bytes = bytearray(pages * PAGE)

    @property
    def pages(self) -> int:
        return len(self.bytes) // PAGE


class Soak:
    """The processes, their arenas, and a source of chance."""

    def __init__(self, cluster: Up, stack: contextlib.ExitStack, rng: random.Random) -> None:
        self._cluster = cluster
        self._stack = stack
        self._rng = rng
        self.processes = [self._start() for _ in range(PROCESSES)]
        self.arenas: list[Arena] = []
        self.made = 0
        self.done = dict.fromkeys(
            ("create", "fill", "write", "share", "unshare", "discard", "check", "close", "kill"), 0
        )

    def step(self) -> None:
        """Do one thing."""
        weights = (6, 10, 20, 12, 3, 4, 6, 3, 0.3)
        what = self._rng.choices(list(self.done), weights)[0]
        if what == "create" or not self.arenas:
            self._create()
        elif what == "kill":
            self._kill(self._rng.randrange(1, PROCESSES))
        else:
            getattr(self, f"_{what}")(self._rng.choice(self.arenas))
        self.done[what] += 1

    def finish(self) -> None:
        """Check and close everything."""
        while self.arenas:
            self._check(self.arenas[-1])
            self._close(self.arenas[-1])

    def _start(self) -> Application:
        return self._stack.enter_context(Application(self._cluster.host()))

    def _call(self, arena: Arena, name: str, *arguments: object) -> object:
        return self.processes[arena.process].call(name, arena.name, *arguments)

    def _patiently(self, arena: Arena, name: str, *arguments: object) -> None:
        """Again and again while a daemon is away."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self._call(arena, name, *arguments)
                return
            except ApplicationError as error:
                assert error.kind in AWAY and time.monotonic() < deadline, error

    def _create(self) -> None:
        if len(self.arenas) == ARENAS_MAX:
            self._close(self._rng.choice(self.arenas))
        self.made += 1
        process = self._rng.randrange(PROCESSES)
        arena = Arena(process, f"arena-{self.made}", self._rng.randint(1, PAGES_MAX))
        self._patiently(arena, "create", arena.pages)
        self.arenas.append(arena)

    def _fill(self, arena: Arena) -> None:
        seed, page = self._rng.choice(SEEDS), self._rng.randrange(arena.pages)
        pages = self._rng.randint(1, arena.pages - page)
        self._call(arena, "fill", seed, page, pages)
        arena.bytes[page * PAGE : (page + pages) * PAGE] = content(seed, pages)

    def _write(self, arena: Arena) -> None:
        data, offset = self._rng.randbytes(16), self._rng.randrange(len(arena.bytes) - 16)
        self._call(arena, "write", offset, data.hex())
        arena.bytes[offset : offset + 16] = data

    def _share(self, arena: Arena) -> None:
        with contextlib.suppress(ApplicationError):  # a daemon is coming back
            self._call(arena, "share")

    def _unshare(self, arena: Arena) -> None:
        self._call(arena, "unshare")

    def _discard(self, arena: Arena) -> None:
        page = self._rng.randrange(arena.pages)
        pages = self._rng.randint(1, arena.pages - page)
        self._call(arena, "discard", page, pages)
        arena.bytes[page * PAGE : (page + pages) * PAGE] = bytes(pages * PAGE)

    def _check(self, arena: Arena) -> None:
        expected = hashlib.sha256(arena.bytes).hexdigest()
        assert self._call(arena, "digest") == expected, f"the bytes of {arena.name}"

    def _close(self, arena: Arena) -> None:
        self._call(arena, "close")
        self.arenas.remove(arena)

    def _kill(self, process: int) -> None:
        self.processes[process].process.kill()
        self.processes[process] = self._start()
        self.arenas = [arena for arena in self.arenas if arena.process != process]


def kill_daemon(cluster: Up, rng: random.Random) -> None:
    """kill -9; `samepage up` starts it anew."""
    daemons = cluster.daemons()
    pid = daemons.get(f"host-1/{rng.choice(('merger', 'scanner'))}")
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Up]:
    with running(tmp_path / "cluster") as up:
        yield up


def third(samples: list[Sample], which: int, field: str) -> float:
    """The median of one of three parts."""
    size = max(len(samples) // 3, 1)
    part = samples[:size] if which == 0 else samples[-size:]
    return float(statistics.median(getattr(each, field) for each in part))


def check_flat(samples: list[Sample]) -> None:
    """No daemon holds more at the end than at the beginning."""
    for name in sorted({each.name for each in samples}):
        mine = [each for each in samples if each.name == name]
        grown = third(mine, 2, "anonymous") - third(mine, 0, "anonymous")
        assert grown <= ALLOWED_BYTES, f"{name} grew by {grown / (1 << 20):.1f} MiB"
        for field in ("descriptors", "mappings"):
            grown = third(mine, 2, field) - third(mine, 0, field)
            limit = DESCRIPTORS_ALLOWED if field == "descriptors" else 40
            assert grown <= limit, f"{name} has {grown:.0f} more {field}"


def empty(merger: merger_pb2_grpc.MergerStub) -> bool:
    """Whether nothing is shared, and the store holds nothing."""
    status = merger.GetMergerStatus(merger_pb2.GetMergerStatusRequest(), wait_for_ready=True)
    return not (status.arenas or status.slots or status.shared_pages or status.store_bytes)


def test_soak(cluster: Up) -> None:
    seed = int(os.environ.get("SAMEPAGE_TEST_SEED", "0")) or random.randrange(1, 2**32)
    print(f"SAMEPAGE_TEST_SEED={seed}")
    rng = random.Random(seed)
    samples: list[Sample] = []
    with contextlib.ExitStack() as stack:
        soak = Soak(cluster, stack, rng)
        lasting = soak.processes[0].pid
        soak.processes[0].call("descriptors")  # it is connected from here on
        began = time.monotonic()
        before = sample("application", lasting, began)
        next_kill = began + SECONDS / 10
        while time.monotonic() - began < SECONDS * KILLING_PART:
            soak.step()
            if time.monotonic() > next_kill:
                next_kill = time.monotonic() + min(15.0, SECONDS / 10)
                kill_daemon(cluster, rng)
        next_sample = 0.0
        while time.monotonic() - began < SECONDS:
            soak.step()
            if time.monotonic() >= next_sample:
                next_sample = time.monotonic() + SAMPLE_SECONDS
                samples += [sample(n, pid, began) for n, pid in cluster.daemons().items()]
        soak.finish()
        with grpc.insecure_channel(f"unix:{cluster.host()}/merger-api.sock") as channel:
            merger = merger_pb2_grpc.MergerStub(channel)
            deadline = time.monotonic() + 10
            while not empty(merger) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert empty(merger)
        after = sample("application", lasting, began)
        print(json.dumps({"steps": soak.done, "samples": [asdict(each) for each in samples]}))
    check_flat(samples)
    assert after.descriptors <= before.descriptors + 2
    assert after.mappings <= before.mappings + 20
