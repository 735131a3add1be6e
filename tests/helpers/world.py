"""A cluster of real hosts in network namespaces, its applications, and what their arenas must hold.

For tests that let things fail: operations are tried until they succeed, each attempt's error must
be one that tells what to do, and after each the bytes are compared.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from application import PAGE, Application, ApplicationError, content
from helpers.up import Up, descendants, running

from samepage.cli.cluster import store_directory
from samepage.cli.netns import Network
from samepage.daemon import failpoints
from samepage.v1 import merger_pb2, merger_pb2_grpc, scanner_pb2, scanner_pb2_grpc

SERVICES = ("merger", "scanner", "arenas")
#: What may be said of a cluster that is not well: each tells to try again, or whom to look after.
PASSING = (
    "ServiceUnavailableError",
    "CloneTimeoutError",
    "EvictTimeoutError",
    "FetchTimeoutError",
    "ShareTimeoutError",
    "NotFoundError",
    "NotRunningError",
)
# A machine that has much to do stops its writers for longer.
_CLONES: dict[str, tuple[str, dict[str, float]]] = {
    "clone": ("clone_arena", {}),
    "lazy clone": ("clone_arena", {"lazy": True}),
    "migrate": ("migrate_arena", {"max_freeze": 5.0}),
}
_HEAL_SECONDS = 90.0
_STEP_SECONDS = 0.02
_SHARED = 5
_CALL_SECONDS = 20.0


@dataclass(eq=False)
class Held:
    """An arena, where it is, and its bytes, which were made from a seed."""

    host: int
    name: str
    bytes: bytearray
    seed: int = 0

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.bytes) // PAGE

    @property
    def source(self) -> str:
        """What other hosts call it."""
        return f"host-{self.host}/{self.name}"


class World:
    """The cluster, an application a host, and the arenas.

    Attributes:
        up: the cluster.
        network: its links and namespaces.
        failpoints: the directory in which they are laid.
        arenas: all that are open.
    """

    def __init__(self, up: Up, failpoints_directory: Path, hosts: int) -> None:
        self.up = up
        names = [f"host-{number}" for number in range(1, hosts + 1)]
        self.network = Network(up.directory, ["index", *names])
        self.failpoints = failpoints_directory
        self.hosts = range(1, hosts + 1)
        self.arenas: list[Held] = []
        self._applications: dict[int, Application] = {}
        self._made = 0

    def application(self, host: int) -> Application:
        """The host's application; a new one when the last has ended."""
        found = self._applications.get(host)
        if found is None or found.process.poll() is not None:
            found = self._applications[host] = Application(self.up.host(host))
        return found

    def kill_application(self, host: int) -> None:
        """kill -9; its arenas end with it."""
        application = self.application(host)
        application.process.kill()
        application.process.wait()
        application.end()
        self.arenas = [held for held in self.arenas if held.host != host]

    def reset(self) -> None:
        """Forget what a test that failed has left."""
        for host in self.hosts if self.arenas or self.laid() else ():
            self.kill_application(host)

    def settle(self) -> None:
        """Wait until hosts reach the index and each other: who was away is not asked again at
        once."""
        for host in self.hosts:
            self.wait(functools.partial(self._reaches_index, host), f"host-{host} has no index")
        for one, other in itertools.permutations(self.hosts, 2):
            source = self.create(one, 1)
            for held in (self.clone("clone", source, other), source):
                self.close(held)

    def _reaches_index(self, host: int) -> bool:
        """Whether its merger does: it has to ask about a host of which it has never heard."""
        name = self.new_name()
        with pytest.raises(ApplicationError) as raised:
            self.application(host).call(
                "clone", "clone_arena", "nobody/nothing", name, _CALL_SECONDS
            )
        self.may_pass(raised.value)
        return raised.value.kind == "NotFoundError"

    def link(self, host: int | str) -> str:
        """The cable of a host, or of the index."""
        return self.network.link(host if isinstance(host, str) else f"host-{host}")

    def namespace(self, host: int) -> str:
        """The network namespace of a host."""
        return self.network.namespace(f"host-{host}")

    # Failing

    def lay(self, name: str, action: str) -> None:
        """Let the next daemon that comes by a failpoint do something."""
        assert name in failpoints.FAILPOINTS
        draft = self.failpoints / f".{name}"
        draft.write_text(action)
        draft.rename(self.failpoints / name)

    def acted(self, name: str) -> bool:
        """Whether a daemon came by a failpoint that was laid."""
        return not (self.failpoints / name).exists()

    def laid(self) -> list[str]:
        """The failpoints that nobody came by; they are taken away."""
        found = sorted(self.failpoints.iterdir())
        for path in found:
            path.unlink()
        return [path.name for path in found]

    def await_acted(self, name: str) -> None:
        """Wait until a daemon comes by."""
        self.wait(lambda: self.acted(name), f"nobody came by {name}")

    def pid(self, service: str) -> int | None:
        """The process of "index", "redis" or "host-N/merger"; None while it is down."""
        with contextlib.suppress(OSError, ValueError):
            daemons = self.up.daemons()
            if service != "redis":
                return daemons.get(service)
            if "index" in daemons:
                [pid] = descendants(daemons["index"])
                return pid
        return None

    def kill(self, service: str) -> bool:
        """SIGKILL; False when it is down already."""
        pid = self.pid(service)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    @contextlib.contextmanager
    def stopped(self, service: str) -> Iterator[None]:
        """Let a process stand still: whoever talks to it hears nothing."""
        pid = self.pid(service)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def pass_time(self, seconds: float) -> None:
        """Let whatever is under way fail, or go on, for a while."""
        time.sleep(seconds)

    # Doing

    def new_name(self) -> str:
        """A name that no arena has had."""
        self._made += 1
        return f"arena-{self._made}"

    def create(self, host: int, pages: int, seed: int = 0) -> Held:
        """An arena with bytes from a seed; default: such as no other arena has."""
        name = self.new_name()
        seed = seed or 1000 + self._made
        self._eventually(host, "create", name, pages)
        self.application(host).call("fill", name, seed)
        held = Held(host, name, bytearray(content(seed, pages)), seed)
        self.arenas.append(held)
        return held

    def write(self, held: Held, page: int, data: bytes) -> None:
        """Write into a page."""
        self.application(held.host).call("write", held.name, page * PAGE, data.hex())
        held.bytes[page * PAGE : page * PAGE + len(data)] = data

    def share(self, held: Held) -> None:
        """Share an arena."""
        self._eventually(held.host, "share", held.name)

    def start(self, call: str, host: int, *arguments: object) -> Callable[[], Any]:
        """Begin a call of an application; the result waits for its end."""
        application = self.application(host)
        application.start(call, *arguments)
        return application.finish

    def start_clone(self, call: str, source: Held, to: int) -> tuple[str, Callable[[], Held]]:
        """Begin "clone", "lazy clone" or "migrate"; the result tries until it is done."""
        name = self.new_name()
        function, options = _CLONES[call]
        arguments = (function, source.source, name, _CALL_SECONDS, options)
        finish = self.start("clone", to, *arguments)

        def done() -> Held:
            try:
                finish()
            except ApplicationError as error:
                self.may_pass(error)
                self.check_owner(source)
                self._eventually(to, "clone", *arguments)
            if call == "migrate":
                self.check_left(source)
            held = Held(to, name, bytearray(source.bytes))
            self.arenas.append(held)
            return held

        return name, done

    def clone(self, call: str, source: Held, to: int) -> Held:
        """Clone or migrate an arena."""
        return self.start_clone(call, source, to)[1]()

    def copy_or_nothing(self, host: int, source: Held) -> None:
        """End a clone whose source is gone: it is there with all its bytes, or not at all."""
        name = f"arena-{self._made}"
        try:
            self.application(host).finish()
        except ApplicationError as error:
            self.may_pass(error)
            self.wait(lambda: name not in self.names(host), "a clone that failed is there")
        else:
            self.arenas.append(Held(host, name, bytearray(source.bytes)))

    def evict(self, held: Held) -> dict[str, int]:
        """Evict an arena; what became of its pages."""
        report: dict[str, int] = self._eventually(held.host, "evict", held.name)
        return report

    def fetch(self, held: Held) -> None:
        """Bring all of an arena back."""
        self._eventually(held.host, "fetch", held.name)

    def close(self, held: Held) -> None:
        """Close an arena."""
        self.application(held.host).call("close", held.name)
        self.arenas.remove(held)

    def close_all(self) -> None:
        """Close every arena."""
        for held in list(self.arenas):
            self.close(held)

    def _eventually(self, host: int, call: str, *arguments: object) -> Any:
        """Call until it succeeds."""
        deadline = time.monotonic() + _HEAL_SECONDS
        while True:
            try:
                return self.application(host).call(call, *arguments)
            except ApplicationError as error:
                self.may_pass(error)
                assert time.monotonic() < deadline, f"{call} does not heal: {error}"
            time.sleep(_STEP_SECONDS)

    def may_pass(self, error: ApplicationError) -> None:
        """An error that may be seen while something fails."""
        told = error.kind in PASSING or "failpoint" in str(error)
        assert told, f"{error} is no error to pass"

    def wait(self, condition: Callable[[], object], otherwise: str | Callable[[], str]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + _HEAL_SECONDS
        while not condition():
            text = otherwise if isinstance(otherwise, str) else otherwise()
            assert time.monotonic() < deadline, text
            time.sleep(_STEP_SECONDS)

    # Looking

    def check_owner(self, held: Held) -> None:
        """The arena is its application's still."""
        self.application(held.host).call("stats", held.name)

    def check_left(self, held: Held) -> None:
        """The arena is its application's no more: it is said so."""
        application = self.application(held.host)
        try:
            application.call("stats", held.name)
        except ApplicationError as error:
            assert error.kind == "MigratedError", error
        else:
            raise AssertionError(f"{held.source} was migrated, and is there still")
        self.close(held)

    def check_bytes(self) -> None:
        """Every byte of every arena is what was written last."""
        for held in self.arenas:
            found = self.application(held.host).call("digest", held.name)
            assert found == hashlib.sha256(held.bytes).hexdigest(), f"{held.source} has wrong bytes"

    def check_books(self) -> None:
        """The books of every merger say what /proc says of its applications."""
        for host in self.hosts:
            self.wait(functools.partial(self._agree, host), functools.partial(self._books, host))

    def check_gone(self) -> None:
        """Nothing is left of anything: no slot, hold, spilled page, nor note."""
        assert not self.arenas
        for host in self.hosts:
            self.wait(functools.partial(self._clean, host), functools.partial(self._left, host))

    def status(self, host: int) -> merger_pb2.GetMergerStatusResponse:
        """What a merger says."""
        with self._merger(host) as stub:
            return stub.GetMergerStatus(
                merger_pb2.GetMergerStatusRequest(), wait_for_ready=True, timeout=60
            )

    def names(self, host: int) -> list[str]:
        """The arenas that a merger knows."""
        with self._merger(host) as stub:
            found = stub.ListArenas(merger_pb2.ListArenasRequest(), wait_for_ready=True, timeout=60)
            return sorted(arena.name for arena in found.arenas)

    def set_policy(self, host: int, **policy: int) -> None:
        """Change the policy of a merger."""
        with self._merger(host) as stub:
            request = merger_pb2.SetMergerPolicyRequest(policy=merger_pb2.MergerPolicy(**policy))
            stub.SetPolicy(request, wait_for_ready=True, timeout=60)

    def await_published(self, host: int, pages: int) -> None:
        """Wait until the index knows so many fingerprints of a host."""
        target = f"unix:{self.up.host(host)}/scanner-api.sock"
        request = scanner_pb2.GetScannerStatusRequest()
        with grpc.insecure_channel(target) as channel:
            stub = scanner_pb2_grpc.ScannerStub(channel)

            def published() -> bool:
                status = stub.GetScannerStatus(request, wait_for_ready=True, timeout=60)
                return bool(status.index_connected and status.published == pages)

            self.wait(published, f"host-{host} does not publish {pages} fingerprints")

    @contextlib.contextmanager
    def _merger(self, host: int) -> Iterator[merger_pb2_grpc.MergerStub]:
        with grpc.insecure_channel(f"unix:{self.up.host(host)}/merger-api.sock") as channel:
            yield merger_pb2_grpc.MergerStub(channel)

    def _agree(self, host: int) -> bool:
        return self._booked(host) == self._mapped(host)

    def _books(self, host: int) -> str:
        booked, mapped = self._booked(host), self._mapped(host)
        return f"host-{host}: the books say {booked}, the kernel {mapped}"

    def _booked(self, host: int) -> object:
        with self._merger(host) as stub:
            request = merger_pb2.ListArenasRequest()
            arenas = stub.ListArenas(request, wait_for_ready=True, timeout=60).arenas
        status = self.status(host)
        shared = {arena.name: arena.shared_pages for arena in arenas}
        return shared, status.shared_pages, status.slots

    def _mapped(self, host: int) -> object:
        application = self.application(host)
        names = [held.name for held in self.arenas if held.host == host]
        shared = {name: application.call("pagemap", name).count(_SHARED) for name in names}
        slots = {
            (inode, slot + i)
            for name in names
            for _, count, inode, slot in application.call("mappings", name)
            if inode
            for i in range(count)
        }
        return shared, sum(shared.values()), len(slots)

    def _clean(self, host: int) -> bool:
        return not self._left(host)

    def _left(self, host: int) -> str:
        """What is left on a host of arenas that are closed; nothing, as a rule."""
        status = self.status(host)
        counts = {
            name: getattr(status, name)
            for name in (
                "arenas",
                "slots",
                "store_bytes",
                "away_pages",
                "held_elsewhere",
                "held_for_others",
                "spilled",
            )
        }
        left = {name: count for name, count in counts.items() if count}
        store = store_directory(self.up.directory, f"host-{host}")
        notes = [path.name for path in store.glob("*.clone*")]
        return f"left on host-{host}: {left} {notes}" if left or notes else ""


@contextlib.contextmanager
def world(directory: Path, hosts: int, **settings: object) -> Iterator[World]:
    """A cluster of hosts in namespaces; when it ends nothing may be left of it on the machine.

    Args:
        settings: of the mergers, where they are not the defaults.
    """
    laid = directory / "failpoints"
    laid.mkdir()
    env = {f"SAMEPAGE_MERGER_{name.upper()}": str(value) for name, value in settings.items()}
    env[failpoints.VARIABLE] = str(laid)
    # The index learns what stood still from one pass to the next.
    env["SAMEPAGE_SCANNER_INTERVAL_SECONDS"] = "1"
    with running(directory / "up", hosts, "--netns", env=env) as up:
        made = World(up, laid, hosts)
        daemons = list(up.daemons().values())
        try:
            yield made
        finally:
            for application in made._applications.values():
                application.end()
        assert up.stop() == 0
    _check_machine(made, daemons)


def _check_machine(made: World, daemons: list[int]) -> None:
    """No namespace, mount, process, socket or store of the cluster is left."""
    place = str(made.up.directory)
    assert not [name for name in os.listdir("/run/netns") if name.startswith(made.network.bridge)]
    assert not [
        name for name in os.listdir("/sys/class/net") if name.startswith(made.network.bridge)
    ]
    assert place not in Path("/proc/self/mountinfo").read_text()
    assert not [path for path in made.up.directory.rglob("*") if path.is_socket()]
    for host in made.hosts:
        assert not store_directory(made.up.directory, f"host-{host}").exists()
