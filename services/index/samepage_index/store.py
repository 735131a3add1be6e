"""The connection to Redis: checks, scripts, pipelines, and what went wrong in words.

One server or a Redis Cluster: which of the two is at the URL is seen at the first check. What the
index keeps counts only as long as no server may have lost anything, so a cluster has a
**generation**, a name for its primaries with what they hold: it changes when one of them starts
again, when a replica takes over, and when one is flushed, for which each holds a mark. (Of the
server that runs the scripts on hosts, these see by themselves whether it lost anything.)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import redis.asyncio as redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TimeoutError,
)

from samepage.daemon.config import ConfigError
from samepage_index.errors import StoreUnavailableError

VERSION_MIN = 7
# More at once would only wait in the server's queue, where they can time out.
_PIPELINES_AT_ONCE = 4
# A cluster that a primary just left answers again once a replica took over; the caller tries again.
_CLUSTER_RETRIES = 1

Command = tuple[Any, ...]


class Script:
    """A Lua script, made of files in scripts/."""

    def __init__(self, *files: str) -> None:
        folder = resources.files("samepage_index") / "scripts"
        self.source = "\n".join((folder / file).read_text() for file in files)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str | bytes], *arguments: Any) -> Command:
        """The command that runs it."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


@dataclass(frozen=True)
class ServerInfo:
    """What the server says of itself: "redis" or "valkey", its version, and of how many primaries.

    Attributes:
        primaries: of a Redis Cluster; 0 for a single server.
    """

    kind: str
    version: str
    primaries: int = 0


@dataclass(frozen=True)
class Tls:
    """Files for TLS: who signs the servers' certificates, and this client's own with its key."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def settings(self) -> dict[str, str]:
        """As redis-py calls them."""
        files = {"ssl_ca_certs": self.ca, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        return {name: str(file) for name, file in files.items() if file is not None}


class Store:
    """A Redis server, or a Redis Cluster.

    Args:
        url: redis://, rediss:// or unix://; of a cluster, that of any node.
        password: for a URL that holds none.
        timeout: seconds to connect, and for an answer.
        tls: for rediss://.
        prefix: of all keys.

    Attributes:
        place: where it is, for texts; never holds a password.
        generation: see the module's description; empty of a single server.

    Raises:
        ConfigError: the URL makes no sense.
    """

    def __init__(
        self,
        url: str,
        password: str | None = None,
        timeout: float = 10.0,
        tls: Tls | None = None,
        prefix: str = "samepage",
    ) -> None:
        self._url = url
        self._prefix = prefix
        self._settings: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "protocol": 2,
            **(tls or Tls()).settings(),
        }
        try:
            self._server = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **self._settings)
        except ValueError as error:
            raise ConfigError(f"redis_url is not valid: {error}") from error
        settings = self._server.connection_pool.connection_kwargs
        if password is not None:
            if settings.get("password"):
                raise ConfigError("give the password in redis_url or redis_password_file, not both")
            settings["password"] = self._settings["password"] = password
        self.place = settings.get("path") or (
            f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"
        )
        self.generation = b""
        self._cluster: RedisCluster | None = None
        self._turns = asyncio.Semaphore(_PIPELINES_AT_ONCE)
        self._scripts: list[Script] = []

    def register(self, *files: str) -> Script:
        """A script of these files, to be given to the server when it asks for it."""
        script = Script(*files)
        self._scripts.append(script)
        return script

    async def check(self) -> ServerInfo:
        """Connect, see whether the server will do, and learn its generation.

        Raises:
            StoreUnavailableError: it refuses, or is not one that will do.
        """
        async with self._errors():
            if self._cluster is None:
                info = await self._server.info("server")
                cluster = await self._server.info("cluster")
                self._check_version(info)
                if not cluster.get("cluster_enabled"):
                    return _server_info(info)
                self._cluster = self._connect_to_cluster()
            return await self._check_cluster(self._cluster)

    async def run(self, *groups: Sequence[Command]) -> list[Any]:
        """Send commands at once and return their answers. Each must be one that may run twice.

        Within a group a cluster may carry them out in any order; a group begins when the one
        before it is done.

        Raises:
            StoreUnavailableError: one could not be carried out; others may have been.
        """
        if self._cluster is None:
            return await self._run([command for group in groups for command in group])
        return [answer for group in groups for answer in await self._run(group)]

    async def close(self) -> None:
        """Close the connections."""
        await self._server.aclose()
        if self._cluster is not None:
            await self._cluster.aclose()

    async def _run(self, commands: Sequence[Command]) -> list[Any]:
        async with self._turns, self._errors():
            try:
                return await self._pipeline(commands)
            except NoScriptError:
                # The first call since the server started, or someone flushed its scripts.
                for script in self._scripts:
                    await (self._cluster or self._server).script_load(script.source)
                return await self._pipeline(commands)

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = (self._cluster or self._server).pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, RedisError):
                raise answer
        return answers

    def _check_version(self, info: dict[str, Any]) -> None:
        version = str(info.get("redis_version", "0"))
        if int(version.split(".")[0]) < VERSION_MIN:
            raise StoreUnavailableError(
                f"Redis at {self.place} is version {version}: {VERSION_MIN} or newer is needed"
            )

    def _connect_to_cluster(self) -> RedisCluster:
        retry = Retry(NoBackoff(), _CLUSTER_RETRIES)
        try:
            return RedisCluster.from_url(self._url, retry=retry, **self._settings)
        except RedisClusterException as error:
            raise StoreUnavailableError(
                f"Redis at {self.place} is part of a Redis Cluster, for which redis_url will not "
                f"do: {error}"
            ) from error

    async def _check_cluster(self, cluster: RedisCluster) -> ServerInfo:
        nodes: dict[str, dict[str, Any]] = await cluster.cluster_nodes()
        primaries = [node for node in nodes.values() if "master" in node["flags"] and node["slots"]]
        answers = await cluster.info("server", target_nodes=RedisCluster.PRIMARIES)
        infos = list(answers.values()) if "run_id" not in answers else [answers]
        for info in infos:
            self._check_version(info)
        parts = sorted(f"{node['node_id']} {node['epoch']}" for node in primaries)
        parts += sorted(str(info["run_id"]) for info in infos)
        parts += await self._marks(primaries)
        self.generation = " ".join(parts).encode()
        return dataclasses.replace(_server_info(infos[0]), primaries=len(primaries))

    async def _marks(self, primaries: Sequence[dict[str, Any]]) -> list[str]:
        """What stands at a key on each primary, made if nothing does."""
        slots = [(int(node["slots"][0][0]), int(node["slots"][0][-1])) for node in primaries]
        keys = [next(self._keys_between(first, last)) for first, last in sorted(slots)]
        new = uuid.uuid4().hex
        await self._run([("SET", key, new, "NX") for key in keys])
        marks = await self._run([("GET", key) for key in keys])
        return [mark.decode() for mark in marks]

    def _keys_between(self, first: int, last: int) -> Iterator[str]:
        names = (f"{self._prefix}:mark:{number}" for number in itertools.count())
        return (name for name in names if first <= key_slot(name.encode()) <= last)

    @contextlib.asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, RedisClusterException, OSError) as error:
            raise StoreUnavailableError(self._describe(error)) from error

    def _describe(self, error: Exception) -> str:
        where = f"Redis at {self.place}"
        if isinstance(error.__cause__, RedisError):
            # What the client got while it connected, such as a wrong password.
            error = error.__cause__
        if isinstance(error, NoPermissionError):
            return f"{where} does not permit what the index needs, see docs/index.md: {error}"
        if isinstance(error, AuthenticationError | AuthorizationError):
            return (
                f"{where} does not accept the password or user, correct redis_url or "
                f"redis_password_file: {error}"
            )
        if isinstance(error, ClusterDownError | RedisClusterException):
            return f"the Redis Cluster of {self.place} lacks a primary, see CLUSTER INFO: {error}"
        if isinstance(error, BusyLoadingError):
            return f"{where} is still loading its data: wait"
        if isinstance(error, TimeoutError):
            return f"{where} does not answer in time: {error}"
        if isinstance(error, ConnectionError | OSError):
            return f"{where} refuses or broke the connection, is it running there? {error}"
        if isinstance(error, OutOfMemoryError):
            return f"{where} is out of memory, raise its maxmemory: {error}"
        if isinstance(error, ReadOnlyError):
            return f"{where} is a replica, set redis_url to the primary: {error}"
        return f"{where} fails: {error}"


def _server_info(info: dict[str, Any]) -> ServerInfo:
    if "valkey_version" in info:
        return ServerInfo("valkey", str(info["valkey_version"]))
    return ServerInfo("redis", str(info["redis_version"]))


def read_password(path: Path) -> str:
    """The password in a file, without line ends at its end.

    Raises:
        ConfigError: the file cannot be read, or holds nothing.
    """
    try:
        password = path.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read redis_password_file {path}: {error}") from error
    if not password:
        raise ConfigError(f"redis_password_file {path} is empty")
    return password
