"""The connection to Redis: checks, scripts, pipelines, and what went wrong in words."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from samepage.daemon.config import ConfigError
from samepage_index.errors import StoreUnavailableError

VERSION_MIN = 7
# More at once would only wait in the server's queue, where they can time out.
_PIPELINES_AT_ONCE = 4

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
    """What the server says of itself: "redis" or "valkey", and its version."""

    kind: str
    version: str


class Store:
    """A Redis server.

    Args:
        url: redis://, rediss:// or unix://.
        password: for a URL that holds none.
        timeout: seconds to connect, and for an answer.

    Attributes:
        place: where it is, for texts; never holds a password.

    Raises:
        ConfigError: the URL makes no sense.
    """

    def __init__(self, url: str, password: str | None = None, timeout: float = 10.0) -> None:
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise ConfigError(f"redis_url is not valid: {error}") from error
        settings = self._redis.connection_pool.connection_kwargs
        if password is not None:
            if settings.get("password"):
                raise ConfigError("give the password in redis_url or redis_password_file, not both")
            settings["password"] = password
        self.place = settings.get("path") or (
            f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"
        )
        self._turns = asyncio.Semaphore(_PIPELINES_AT_ONCE)
        self._scripts: list[Script] = []

    def register(self, *files: str) -> Script:
        """A script of these files, to be given to the server when it asks for it."""
        script = Script(*files)
        self._scripts.append(script)
        return script

    async def check(self) -> ServerInfo:
        """Connect, and see whether the server will do.

        Raises:
            StoreUnavailableError: it refuses, or is not one that will do.
        """
        async with self._errors():
            info = await self._redis.info("server")
            cluster = await self._redis.info("cluster")
        version = str(info.get("redis_version", "0"))
        if int(version.split(".")[0]) < VERSION_MIN:
            raise StoreUnavailableError(
                f"Redis at {self.place} is version {version}: {VERSION_MIN} or newer is needed"
            )
        if cluster.get("cluster_enabled"):
            raise StoreUnavailableError(
                f"Redis at {self.place} is part of a Redis Cluster, which the index cannot use "
                "yet: give redis_url of a single server"
            )
        if "valkey_version" in info:
            return ServerInfo("valkey", str(info["valkey_version"]))
        return ServerInfo("redis", version)

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands at once and return their answers. Each must be one that may run twice.

        Raises:
            StoreUnavailableError: one could not be carried out; others may have been.
        """
        async with self._turns, self._errors():
            try:
                return await self._pipeline(commands)
            except NoScriptError:
                # The first call since the server started, or someone flushed its scripts.
                await self._load_scripts()
                return await self._pipeline(commands)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, RedisError):
                raise answer
        return answers

    async def _load_scripts(self) -> None:
        for script in self._scripts:
            await self._redis.script_load(script.source)

    @contextlib.asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
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
