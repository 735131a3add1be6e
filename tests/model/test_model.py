"""Rule 7, and rule 1: random programs end with the bytes that were written and with exact books.

300 programs in the normal run; `make model` runs 5,000 (SAMEPAGE_MODEL_PROGRAMS). A failure prints
the shortest program that shows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from application import Application, ApplicationError
from helpers.up import Up, running
from hypothesis import HealthCheck, Phase, given, settings
from model.programs import (
    DOMAINS,
    PAGE,
    PROCESSES,
    ZEROS,
    Close,
    Create,
    Discard,
    Fork,
    KillDaemon,
    KillProcess,
    Model,
    ModelArena,
    Poke,
    Seal,
    Share,
    Step,
    Unshare,
    Write,
    pattern,
    programs,
)

from samepage.v1 import merger_pb2, merger_pb2_grpc

pytestmark = [
    pytest.mark.needs("root", "userfaultfd", "move", "wp_tmpfs", "remap"),
    pytest.mark.slow,
    pytest.mark.timeout(int(os.environ.get("SAMEPAGE_MODEL_SECONDS", "600"))),
]

PROGRAMS = int(os.environ.get("SAMEPAGE_MODEL_PROGRAMS", "300"))
SHARED = 5  # bits 63 and 61 of a page map entry: present, and the store's
REST_SECONDS = 10.0
COMEBACK_SECONDS = 60.0
# One would share, in the midst of a program or of the look at its end, what no model knows of.
_NO_BACKGROUND_PASSES = {
    f"SAMEPAGE_SCANNER_{name}": "86400" for name in ("INTERVAL_SECONDS", "INTERVAL_MAX_SECONDS")
}
_AWAY = ("ServiceUnavailableError", "ShareTimeoutError", "NotRunningError")


class Host:
    """A real host, and processes on it that are used again from program to program."""

    def __init__(self, cluster: Up, stack: contextlib.ExitStack) -> None:
        self._cluster = cluster
        self._stack = stack
        self._processes = [self._start() for _ in range(PROCESSES)]
        self._channel = stack.enter_context(
            grpc.insecure_channel(f"unix:{cluster.host()}/merger-api.sock")
        )
        self.merger = merger_pb2_grpc.MergerStub(self._channel)

    def call(self, arena: ModelArena, name: str, *arguments: object) -> Any:
        """Call a function of tests/application.py in the arena's process."""
        return self._processes[arena.process].call(name, arena.name, *arguments)

    def patiently(self, arena: ModelArena, name: str, *arguments: object) -> Any:
        """The same, again and again while a daemon is away."""
        return eventually(lambda: self._try(arena, name, *arguments), COMEBACK_SECONDS)

    def kill_process(self, process: int) -> None:
        """kill -9, and a new one in its place."""
        self._processes[process].process.kill()
        self._processes[process] = self._start()

    def kill_daemon(self, daemon: str) -> None:
        """kill -9; `samepage up` starts it anew."""
        pid = eventually(lambda: self._cluster.daemons().get(f"host-1/{daemon}"), COMEBACK_SECONDS)
        os.kill(pid, signal.SIGKILL)

    def _start(self) -> Application:
        return self._stack.enter_context(Application(self._cluster.host()))

    def _try(self, arena: ModelArena, name: str, *arguments: object) -> Any:
        try:
            return self.call(arena, name, *arguments) or True
        except ApplicationError as error:
            assert error.kind in _AWAY, error
            return None


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with contextlib.ExitStack() as stack:
        directory = tmp_path_factory.mktemp("model") / "cluster"
        cluster = stack.enter_context(running(directory, env=_NO_BACKGROUND_PASSES))
        yield Host(cluster, stack)


def eventually(look: Callable[[], Any], seconds: float = REST_SECONDS) -> Any:
    """What `look` returns once it is true; the last look raises what it raises."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.005)
    return look()


def carry_out(host: Host, model: Model, step: Step) -> None:
    """Do it, and let the model do it."""
    match step:
        case Create(process, domain, pages):
            if len(model.arenas) < 8:
                arena = model.create(process, DOMAINS[domain], pages)
                host.patiently(arena, "create", pages, arena.domain)
            return
        case KillProcess(process):
            host.kill_process(process)
            model.arenas = [arena for arena in model.arenas if arena.process != process]
            return
        case KillDaemon(daemon):
            host.kill_daemon(daemon)
            return
    found = model.pick(step.arena)
    if found is not None:
        _in_arena(host, model, found, step)


def _in_arena(host: Host, model: Model, arena: ModelArena, step: Step) -> None:
    if arena.sealed and isinstance(step, Write | Poke | Discard | Fork):
        return
    match step:
        case Write(_, page, count, number):
            page %= len(arena.pages)
            for at in range(page, min(page + count, len(arena.pages))):
                data = pattern(number + at - page if number else 0)
                host.call(arena, "write", at * PAGE, data.hex())
                arena.write(at, data)
        case Poke(_, page, offset, value):
            page %= len(arena.pages)
            data = value.to_bytes(8, "little")
            host.call(arena, "write", page * PAGE + offset, data.hex())
            before = arena.pages[page]
            arena.write(page, before[:offset] + data + before[offset + 8 :])
        case Share():
            model.shared(arena.domain)
            eventually(lambda: share(host, model, arena), COMEBACK_SECONDS)
        case Unshare():
            host.call(arena, "unshare")
            arena.may.clear()
            assert shared_pages(host, arena) == set()
        case Discard(_, page, count):
            page %= len(arena.pages)
            count = min(count, len(arena.pages) - page)
            host.call(arena, "discard", page, count)
            for at in range(page, page + count):
                arena.write(at, ZEROS)
        case Seal():
            host.call(arena, "seal")
            arena.sealed = True
        case Fork(_, page):
            page %= len(arena.pages)
            host.call(arena, "write_beside_a_child", page * PAGE, pattern(400).hex())
            arena.write(page, pattern(400))
        case Close():
            host.call(arena, "close")
            model.arenas.remove(arena)


def share(host: Host, model: Model, arena: ModelArena) -> bool:
    """Share until all is shared that must be: a daemon may be coming back."""
    try:
        host.call(arena, "share")
    except ApplicationError as error:
        assert error.kind in _AWAY, error
        return False
    alike = [each for each in model.arenas if each.domain == arena.domain]
    return all(shared_pages(host, each) >= model.must(each) for each in alike)


def shared_pages(host: Host, arena: ModelArena) -> set[int]:
    """The pages that map the store, as the kernel tells."""
    entries = host.call(arena, "pagemap")
    return {page for page, entry in enumerate(entries) if entry == SHARED}


def check(host: Host, model: Model) -> None:
    """Bytes, mappings and books, at rest."""
    references: dict[str, set[int]] = {}
    slots: dict[str, set[tuple[int, int]]] = {domain: set() for domain in DOMAINS}
    for arena in model.arenas:
        expected = hashlib.sha256(b"".join(arena.pages)).hexdigest()
        assert host.call(arena, "digest") == expected, f"the bytes of {arena.name}"
        references[arena.name] = shared_pages(host, arena)
        assert references[arena.name] <= arena.may, f"{arena.name} shares what it must not"
        for _, count, inode, slot in host.call(arena, "mappings"):
            if inode:
                slots[arena.domain] |= {(inode, slot + i) for i in range(count)}
    inodes = [{inode for inode, _ in slots[domain]} for domain in DOMAINS]
    assert not inodes[0] & inodes[1], "domains share a store"
    counts = {name: len(pages) for name, pages in references.items()}
    total = len(slots[DOMAINS[0]] | slots[DOMAINS[1]])
    eventually(lambda: books(host) == (counts, total, total * PAGE))
    assert books(host) == (counts, total, total * PAGE)


def books(host: Host) -> tuple[dict[str, int], int, int] | None:
    """Shared pages by arena, slots, bytes of the store; None while the merger is away."""
    try:
        arenas = host.merger.ListArenas(merger_pb2.ListArenasRequest(), wait_for_ready=True).arenas
        status = host.merger.GetMergerStatus(merger_pb2.GetMergerStatusRequest())
    except grpc.RpcError:
        return None
    return {a.name: a.shared_pages for a in arenas}, status.slots, status.store_bytes


@settings(
    max_examples=PROGRAMS,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(program=programs())
def test_programs(host: Host, program: list[Step]) -> None:
    model = Model()
    try:
        for step in program:
            carry_out(host, model, step)
        check(host, model)
    finally:
        for arena in model.arenas:
            host.patiently(arena, "close")
        model.arenas.clear()
    check(host, model)
