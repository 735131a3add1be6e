"""The store: one file a domain on a tmpfs, which only the merger can write.

Rules. A slot is one page of the file; slot 0 is never given. The file only grows, and the next
slot is always its end, so that a slot's number is never used twice, over restarts neither: an
agent that maps a slot can never see bytes that were meant for another. What is free goes back to
the kernel by punching holes. Agents get descriptors through a read-only mount (see view.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from samepage.daemon.wire import PAGE_SIZE
from samepage_merger.runs import Int64s, join
from samepage_merger.view import ReadOnlyView, StoreError

#: A store's id, and how much of it says in which life of which machine.
STORE_ID_BYTES = 16
LIFE_BYTES = 8

_TMPFS_MAGIC = 0x0102_1994
_PUNCH_HOLE = 0x2
_KEEP_SIZE = 0x1
_WARN_SECONDS = 60.0
_SUFFIX = ".store"
_NAME = re.compile(r"[0-9a-f]{32}\.store")
_HOLDS = ".holds"
# Of clones under way (cluster/journal.py).
_NOTES = ".clone"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

log = structlog.get_logger(__name__)


class StoreFullError(Exception):
    """The store has no room for these pages now."""


class StoreDirectory:
    """All stores of a host, and how much they may hold together.

    Args:
        path: a directory on a tmpfs; made if missing, for this user alone.
        readonly_dir: a read-only mount of it, or None to make one.
        limit_bytes: what all stores may hold; 0 for half of the tmpfs.

    Raises:
        StoreError: the directory will not do, or another merger has it.
    """

    def __init__(self, path: Path, readonly_dir: Path | None = None, limit_bytes: int = 0) -> None:
        self.path = path
        self._stores: dict[str, Store] = {}
        self._made_view = readonly_dir is None
        self._fd = _lock_directory(path)
        try:
            _check_tmpfs(path)
            _check_huge(path)
            self.view = ReadOnlyView(path, readonly_dir)
        except StoreError:
            os.close(self._fd)
            raise
        self.limit(limit_bytes)
        self._next_warning = 0.0

    def limit(self, limit_bytes: int) -> None:
        """Set what all stores may hold, 0 for half of the tmpfs; what they hold stays."""
        self.limit_bytes = limit_bytes or _half_of(self.path)

    def open(self, domain_id: bytes) -> Store:
        """Return the store of a domain; made if missing."""
        name = f"{domain_id.hex()}{_SUFFIX}"
        if name not in self._stores:
            self._stores[name] = Store(self, name, self._fd)
        return self._stores[name]

    def existing(self) -> Iterator[bytes]:
        """The ids of the domains that have a store here, from an earlier merger too."""
        for name in sorted(os.listdir(self._fd)):
            if _NAME.fullmatch(name):
                yield _domain_id(name)
            elif not (_HOLDS in name or name.endswith(_NOTES)):
                log.warning("a file that is no store", path=str(self.path / name))

    @property
    def id(self) -> bytes:
        """Where in which machine's memory this is, 16 bytes; mergers that follow each other on it
        have the same. Of stores of one life of a machine, the first LIFE_BYTES are equal."""
        place = os.fstat(self._fd)
        texts = _BOOT_ID.read_text(), f"{place.st_dev} {place.st_ino}"
        return b"".join(
            hashlib.blake2b(text.encode(), digest_size=LIFE_BYTES).digest() for text in texts
        )

    def holds_path(self, domain_id: bytes) -> Path:
        """Where it is noted which slots of a domain are held for other hosts."""
        return self.path / f"{domain_id.hex()}{_HOLDS}"

    def resident_bytes(self) -> int:
        """Bytes that all stores hold, as their block counts tell."""
        return sum(store.resident_bytes() for store in self._stores.values())

    def room(self, pages: int) -> int:
        """Return how many of so many more pages the limit allows; warns now and then if not all."""
        left = (self.limit_bytes - self.resident_bytes()) // PAGE_SIZE
        if left < pages:
            self.warn_full("store_limit_bytes is reached")
        return max(0, min(left, pages))

    def warn_full(self, why: str) -> None:
        """Log that pages were refused, at most once a minute."""
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + _WARN_SECONDS
            log.warning(
                "the store is full: pages stay private until some are freed, or the limit is"
                " raised",
                why=why,
                store=str(self.path),
                resident_bytes=self.resident_bytes(),
                limit_bytes=self.limit_bytes,
            )

    def close(self, unused: Callable[[bytes], bool] = lambda domain_id: False) -> None:
        """Close every store, and remove those that `unused` says nobody maps."""
        for name, store in self._stores.items():
            if unused(_domain_id(name)):
                os.unlink(name, dir_fd=self._fd)
                self.holds_path(_domain_id(name)).unlink(missing_ok=True)
            store.close()
        self._stores.clear()
        self.view.close()
        if self._made_view and not os.listdir(self._fd):
            _remove_directory(self.path)
        os.close(self._fd)


class Store:
    """One domain's file of slots.

    Attributes:
        fd: the merger's own descriptor, for reading and writing; never locked.
        slots: the size of the file in slots; the next one to be given.
    """

    def __init__(self, directory: StoreDirectory, name: str, directory_fd: int) -> None:
        self._directory = directory
        self.name = name
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(name, flags, 0o600, dir_fd=directory_fd)
        size = os.fstat(self.fd).st_size
        self.slots = max(1, -(-size // PAGE_SIZE))
        os.ftruncate(self.fd, self.slots * PAGE_SIZE)

    def open_for_agent(self) -> int:
        """Return a new open file description that nobody can write through."""
        return self._directory.view.open(self.name)

    def reserve(self, pages: int) -> int:
        """Return the first of as many new consecutive slots, which take no memory until written."""
        first = self.slots
        os.ftruncate(self.fd, (first + pages) * PAGE_SIZE)
        self.slots = first + pages
        return first

    def room(self, pages: int) -> int:
        """Return how many of so many more pages the limit of all stores allows."""
        return self._directory.room(pages)

    def write(self, slot: int, data: bytes | bytearray | memoryview) -> None:
        """Fill reserved slots from `slot` on; only ever before anyone was told of them.

        Raises:
            StoreFullError: the limit or the tmpfs has no room; some may be filled.
        """
        view = memoryview(data)
        offset = slot * PAGE_SIZE
        if self.room(len(view) // PAGE_SIZE) * PAGE_SIZE < len(view):
            raise StoreFullError
        while view:
            try:
                written = os.pwrite(self.fd, view, offset)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                    raise
                self._directory.warn_full(os.strerror(error.errno))
                raise StoreFullError from error
            view = view[written:]
            offset += written

    def read(self, slot: int, pages: int) -> bytes:
        """Return the bytes of consecutive slots."""
        return os.pread(self.fd, pages * PAGE_SIZE, slot * PAGE_SIZE)

    def read_all(self, slots: Int64s) -> bytes:
        """Return the bytes of slots, one after the other."""
        first, count = join(slots)
        runs = map(self.read, first.tolist(), count.tolist())
        return next(runs) if first.size == 1 else b"".join(runs)

    def free(self, slots: Int64s) -> None:
        """Give back the memory of slots (ascending) that no living process maps."""
        if not slots.size:
            return
        first, count = join(slots)
        for offset, size in zip(
            (first * PAGE_SIZE).tolist(), (count * PAGE_SIZE).tolist(), strict=True
        ):
            punch(self.fd, offset, size)

    def free_all_but(self, live: Int64s) -> None:
        """Give back every slot that is not in `live` (ascending), and whatever is in slot 0."""
        first, count = join(live)
        starts = [0, *((first + count) * PAGE_SIZE).tolist()]
        ends = [*(first * PAGE_SIZE).tolist(), self.slots * PAGE_SIZE]
        for start, end in zip(starts, ends, strict=True):
            if end > start:
                punch(self.fd, start, end - start)

    def resident_bytes(self) -> int:
        """Bytes of memory (or swap) that the file holds."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the merger's own descriptor."""
        os.close(self.fd)


def punch(fd: int, offset: int, size: int) -> None:
    """Give back a part of a file.

    Raises:
        OSError: the file system cannot.
    """
    while _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def _domain_id(name: str) -> bytes:
    return bytes.fromhex(name.removesuffix(_SUFFIX))


def _lock_directory(path: Path) -> int:
    """Return the directory's descriptor, which keeps other mergers out as long as it is open."""
    while True:
        fd = _open_directory(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise StoreError(
                f"another merger uses store_dir {path}: stop it first, or give this one a"
                " store_dir of its own"
            ) from error
        # A merger that just stopped may have removed the directory between open and lock.
        if path.is_dir() and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
        os.close(fd)


def _open_directory(path: Path) -> int:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StoreError(
            f"cannot use store_dir {path} ({error.strerror}): set store_dir to a directory on a"
            " tmpfs that the merger owns"
        ) from error
    return fd


def _remove_directory(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as error:
        log.info("the store's directory stays", path=str(path), why=error.strerror)


def _check_tmpfs(path: Path) -> None:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        raise StoreError(f"cannot stat {path}: {os.strerror(ctypes.get_errno())}")
    kind = ctypes.c_long.from_buffer(buffer).value
    if kind != _TMPFS_MAGIC:
        raise StoreError(
            f"store_dir {path} is not on a tmpfs (its file system is 0x{kind:x}): set store_dir to"
            " a directory under /dev/shm, or mount a tmpfs there"
        )


def _check_huge(path: Path) -> None:
    # Punching a part of a huge page zeroes it in place, under whoever still has the page pinned
    # for I/O or in a pipe; single pages are let go of untouched.
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] != wanted:
                continue
            huge = [o for o in fields[-1].split(",") if o.startswith("huge=")]
            if huge and huge != ["huge=never"]:
                raise StoreError(
                    f"the tmpfs of store_dir {path} is mounted with {huge[0]}, where a freed slot"
                    " is zeroed while I/O may still read it: mount it with huge=never"
                )


def _half_of(path: Path) -> int:
    status = os.statvfs(path)
    size = status.f_blocks * status.f_frsize
    # A tmpfs without a size limit shows none: memory is the limit then.
    return (size or os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE) // 2
