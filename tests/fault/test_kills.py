"""kill -9 of any service at any instant: arenas stay usable and byte-equal, sharing comes back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.up import Up, descendants, running

from samepage.v1 import merger_pb2, merger_pb2_grpc

pytestmark = [
    pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

SERVICES = ("merger", "scanner", "index", "redis")
KILLS = 52
PAGES = 3000
PRIVATE_PAGES = 200  # at the end of each arena; the rest is equal in all of them
SHARED = 5
COMEBACK_SECONDS = 60.0


class Model:
    """An application, and what its arena must hold."""

    def __init__(self, application: Application, name: str) -> None:
        self.application = application
        self.name = name
        self.bytes = bytearray(content(11, PAGES))

    def write(self, rng: random.Random) -> None:
        """Write somewhere, in shared pages and in private ones."""
        for page in (rng.randrange(PAGES), rng.randrange(PAGES - PRIVATE_PAGES, PAGES)):
            data = rng.randbytes(16)
            offset = page * PAGE + rng.randrange(PAGE - len(data))
            self.bytes[offset : offset + len(data)] = data
            self.application.call("write", self.name, offset, data.hex())

    def heal(self) -> None:
        """Write the common bytes again, so that the pages can merge again."""
        self.application.call("fill", self.name, 11)
        self.bytes[:] = content(11, PAGES)

    def check(self) -> None:
        """Every byte is what was written last."""
        expected = hashlib.sha256(self.bytes).hexdigest()
        assert self.application.call("digest", self.name) == expected


@pytest.fixture
def models(tmp_path: Path) -> Iterator[tuple[Up, list[Model]]]:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(running(tmp_path / "cluster", env={}))
        found = []
        for number in range(3):
            application = stack.enter_context(Application(cluster.host()))
            model = Model(application, f"arena-{number}")
            application.call("create", model.name, PAGES)
            application.call("fill", model.name, 11)
            found.append(model)
        yield cluster, found


def kill(cluster: Up, service: str) -> bool:
    """SIGKILL; False when it is down already."""
    try:
        daemons = cluster.daemons()
        if service == "redis":
            [pid] = descendants(daemons["index"])
        else:
            pid = daemons["index" if service == "index" else f"host-1/{service}"]
        os.kill(pid, signal.SIGKILL)
    except (KeyError, ValueError, OSError):
        return False
    return True


def await_sharing(models: list[Model]) -> None:
    """Share until everything that is equal is shared again."""
    deadline = time.monotonic() + COMEBACK_SECONDS
    for model in models:
        while True:
            try:
                if model.application.call("share", model.name)["shared"] == PAGES:
                    break
                problem: object = model.application.call("stats", model.name)
            except ApplicationError as error:
                assert error.kind in ("ServiceUnavailableError", "ShareTimeoutError"), error
                problem = error
            assert time.monotonic() < deadline, f"sharing does not come back: {problem}"


def check_books(cluster: Up, models: list[Model]) -> None:
    """The merger's books say what /proc says."""
    with grpc.insecure_channel(f"unix:{cluster.host()}/merger-api.sock") as channel:
        stub = merger_pb2_grpc.MergerStub(channel)
        arenas = stub.ListArenas(merger_pb2.ListArenasRequest(), wait_for_ready=True).arenas
        booked = {arena.name: arena.shared_pages for arena in arenas}
        status = stub.GetMergerStatus(merger_pb2.GetMergerStatusRequest())
    mapped = {
        model.name: model.application.call("pagemap", model.name).count(SHARED) for model in models
    }
    assert booked == mapped
    assert status.shared_pages == sum(mapped.values())
    slots = {
        (inode, slot + i)
        for model in models
        for _, count, inode, slot in model.application.call("mappings", model.name)
        if inode
        for i in range(count)
    }
    assert status.slots == len(slots)


def test_kills_at_random_points(models: tuple[Up, list[Model]]) -> None:
    cluster, applications = models
    seed = int(os.environ.get("SAMEPAGE_TEST_SEED", "0")) or random.randrange(1, 2**32)
    print(f"SAMEPAGE_TEST_SEED={seed}")
    rng = random.Random(seed)
    kills = dict.fromkeys(SERVICES, 0)
    while sum(kills.values()) < KILLS or min(kills.values()) < KILLS // 10:
        for service in rng.sample(SERVICES, len(SERVICES)):
            sharer, *writers = rng.sample(applications, len(applications))
            sharer.application.start("share", sharer.name)
            for model in writers:
                model.write(rng)
            time.sleep(rng.uniform(0, 0.05))  # the random point
            kills[service] += kill(cluster, service)
            for model in writers:
                model.write(rng)
                model.check()
            with contextlib.suppress(ApplicationError):
                sharer.application.finish()
            sharer.write(rng)
            sharer.check()
        for model in applications:
            model.heal()
        await_sharing(applications)
        for model in applications:
            model.check()
        check_books(cluster, applications)
    print(f"killed: {kills}")
