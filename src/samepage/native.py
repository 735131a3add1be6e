"""libsamepage for Python: one function here for each of the library's, errors raised.

Looked for in $SAMEPAGE_LIBRARY, next to this file, and in native/build of a checkout. Calls
release the GIL. Pointers are owned by `samepage.client`; nothing here keeps one.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import functools
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samepage import errors
from samepage.reports import PAGE_SIZE, ArenaStats, CloneProgress, EvictReport, ShareReport

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

FINGERPRINT_SIZE = 16
DIGEST_SIZE = 32
_SEED_MAX = 2**64 - 1


class Feature(enum.IntFlag):
    """What the kernel offers to this process; see `probe`."""

    USERFAULTFD = 1 << 0
    MOVE = 1 << 1
    WP_TMPFS = 1 << 2
    REMAP = 1 << 3
    POISON = 1 << 4
    PAGEMAP_SCAN = 1 << 5
    TRACKING = 1 << 6
    DISCARD = 1 << 7
    AWAY = 1 << 8


NodePointer = ctypes.c_void_p
ArenaPointer = ctypes.c_void_p

# What each errno of the library means to a caller of Python.
ERRORS: Mapping[int, type[errors.SamepageError]] = {
    errno.EINVAL: errors.InvalidArgumentError,
    errno.ENAMETOOLONG: errors.InvalidArgumentError,
    errno.EEXIST: errors.NameTakenError,
    errno.ENOENT: errors.NotRunningError,
    errno.ECONNREFUSED: errors.NotRunningError,
    errno.EACCES: errors.NotRunningError,
    errno.ENOTCONN: errors.ServiceUnavailableError,
    errno.ECONNRESET: errors.ServiceUnavailableError,
    errno.EPIPE: errors.ServiceUnavailableError,
    errno.ETIMEDOUT: errors.ServiceUnavailableError,
    errno.EAGAIN: errors.ServiceUnavailableError,
    errno.EPROTONOSUPPORT: errors.ProtocolVersionError,
    errno.ENOMEM: errors.OutOfMemoryError,
    errno.ENOSPC: errors.OutOfMemoryError,
    errno.ENOSYS: errors.UnsupportedKernelError,
    errno.EOPNOTSUPP: errors.UnsupportedKernelError,
    errno.EBUSY: errors.PinnedError,
    errno.EIO: errors.LostError,
    errno.EPERM: errors.SealedError,
    errno.EBADF: errors.ClosedError,
    errno.ECHILD: errors.ForkedError,
    errno.EREMOTE: errors.MigratedError,
    errno.EHOSTUNREACH: errors.ServiceUnavailableError,
}


class _ShareReport(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "merged",
            "differs",
            "pinned",
            "absent",
            "busy",
            "no_mapping",
            "unsupported",
            "unique",
            "shared",
            "pages",
            "no_headroom",
        )
    ]


class _ArenaStats(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("pages", "private", "shared", "absent", "evicted", "saved_bytes")
    ]


class _EvictReport(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("held_elsewhere", "spilled", "kept", "no_room")
    ]


class _CloneProgress(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("local_bytes", "fetched_bytes", "missing_bytes", "freeze_us")
    ]


class _CloneOptions(ctypes.Structure):
    _fields_ = [
        ("source_host", ctypes.c_char_p),
        ("source_arena", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("domain", ctypes.c_char_p),
        ("flags", ctypes.c_uint32),
        ("max_freeze_ms", ctypes.c_uint32),
        ("give_up", ctypes.POINTER(ctypes.c_int)),
    ]


_CloneCallback = ctypes.CFUNCTYPE(None, ctypes.POINTER(_CloneProgress), ctypes.c_void_p)
CLONE_LAZY = 1
CLONE_MIGRATE = 2
#: What the errno of a clone means, where it is not the usual.
_CLONE_ERRORS: Mapping[int, type[errors.SamepageError]] = {
    errno.ENOENT: errors.NotFoundError,
    errno.ETIMEDOUT: errors.CloneTimeoutError,
    errno.EPERM: errors.PermissionDeniedError,
    errno.EACCES: errors.PermissionDeniedError,
    errno.EIO: errors.SamepageError,
}


def _candidates() -> list[Path]:
    """Where the library may be, in order."""
    chosen = os.environ.get("SAMEPAGE_LIBRARY")
    if chosen:
        return [Path(chosen)]
    package = Path(__file__).resolve().parent
    return [
        package / "libsamepage.so",
        package.parents[1] / "native" / "build" / "libsamepage.so",
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """Load the library and declare its functions.

    Raises:
        SamepageError: it is nowhere, or the loader refuses it.
    """
    tried = _candidates()
    path = next((path for path in tried if path.exists()), None)
    if path is None:
        places = " or ".join(str(path) for path in tried)
        raise errors.SamepageError(
            f"libsamepage.so is not in {places}: build it with 'make native', install the "
            "package again, or name it in SAMEPAGE_LIBRARY"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise errors.SamepageError(f"cannot load libsamepage: {error}") from error
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    out = ctypes.POINTER(ctypes.c_void_p)
    for name, result, arguments in (
        ("sp_probe", ctypes.c_uint32, [text]),
        ("sp_error", text, []),
        ("sp_connect", number, [text, out]),
        ("sp_disconnect", None, [pointer]),
        ("sp_arena_create", number, [pointer, text, text, ctypes.c_size_t, out]),
        ("sp_arena_data", pointer, [pointer]),
        ("sp_arena_domain", ctypes.c_char_p, [pointer]),
        ("sp_arena_size", ctypes.c_size_t, [pointer]),
        ("sp_arena_sealed", number, [pointer]),
        ("sp_arena_share", number, [pointer, number, ctypes.POINTER(_ShareReport)]),
        ("sp_arena_stats", number, [pointer, ctypes.POINTER(_ArenaStats)]),
        ("sp_arena_seal", number, [pointer]),
        ("sp_arena_discard", number, [pointer, ctypes.c_size_t, ctypes.c_size_t]),
        ("sp_arena_fetch", number, [pointer, ctypes.c_size_t, ctypes.c_size_t, number]),
        (
            "sp_arena_evict",
            number,
            [pointer, ctypes.c_size_t, ctypes.c_size_t, number, ctypes.POINTER(_EvictReport)],
        ),
        (
            "sp_arena_clone",
            number,
            [pointer, ctypes.POINTER(_CloneOptions), number, _CloneCallback, pointer, out],
        ),
        ("sp_arena_unshare", number, [pointer]),
        ("sp_arena_close", number, [pointer]),
        ("sp_arena_free", None, [pointer]),
        ("sp_fingerprint", None, [pointer, ctypes.c_size_t, ctypes.c_uint64, pointer]),
        ("sp_digest", None, [pointer, ctypes.c_size_t, ctypes.c_char_p, pointer]),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def _check(result: int, overrides: Mapping[int, type[errors.SamepageError]] | None = None) -> None:
    """Raise what a negative result stands for, with the library's own sentence.

    An errno that the table does not know is a plain SamepageError.
    """
    if result >= 0:
        return
    number = -result
    text: bytes = _library().sp_error()
    kind = (overrides or {}).get(number) or ERRORS.get(number, errors.SamepageError)
    raise kind(text.decode(errors="replace") or os.strerror(number))


def _text(value: str, what: str) -> bytes:
    """Encode for C.

    Raises:
        InvalidArgumentError: it cannot be passed to C.
    """
    try:
        encoded = value.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgumentError(f"{what} {value!r} is not valid Unicode") from error
    if b"\0" in encoded:
        raise errors.InvalidArgumentError(f"{what} {value!r} holds a NUL character")
    return encoded


def probe(directory: str | None = None) -> Feature:
    """Return what this process can use, with what the merger in `directory` lends it.

    None: only what the process can open by itself.
    """
    where = None if directory is None else _text(directory, "the directory")
    return Feature(_library().sp_probe(where))


def connect(directory: str) -> NodePointer:
    """Connect to the daemons in `directory`; the caller disconnects.

    Raises:
        NotRunningError: no merger there, or this user may not reach it.
        ServiceUnavailableError: it does not answer.
        ProtocolVersionError: it speaks another version.
        InvalidArgumentError: the path is too long for a socket.
    """
    node = ctypes.c_void_p()
    _check(_library().sp_connect(_text(directory, "the directory"), ctypes.byref(node)))
    return node


def disconnect(node: NodePointer) -> None:
    """Close the node's arenas and free it."""
    _library().sp_disconnect(node)


def create_arena(node: NodePointer, name: str, domain: str | None, size: int) -> ArenaPointer:
    """Make an arena of `size` bytes, rounded up to whole pages; the caller frees it.

    Raises:
        InvalidArgumentError: a bad name, domain or size.
        NameTakenError: the name is in use in the domain.
        PermissionDeniedError: the process may not use the domain, or any.
        OutOfMemoryError: more than the memory or the address space.
        ServiceUnavailableError: the merger is away, or does not answer.
    """
    arena = ctypes.c_void_p()
    place = None if domain is None else _text(domain, "the domain")
    label = _text(name, "the name")
    result = _library().sp_arena_create(node, label, place, size, ctypes.byref(arena))
    _check(result, {errno.EACCES: errors.PermissionDeniedError})
    return arena


def arena_data(arena: ArenaPointer) -> int:
    """Return the address of the memory."""
    address: int = _library().sp_arena_data(arena)
    return address


def arena_domain(arena: ArenaPointer) -> str:
    """Return the domain, as the merger has it."""
    domain: bytes = _library().sp_arena_domain(arena)
    return domain.decode()


def arena_size(arena: ArenaPointer) -> int:
    """Return the bytes of the memory."""
    size: int = _library().sp_arena_size(arena)
    return size


def arena_sealed(arena: ArenaPointer) -> bool:
    """Return whether it can only be read."""
    return bool(_library().sp_arena_sealed(arena))


def share(arena: ArenaPointer, timeout_ms: int) -> ShareReport:
    """Merge what is equal now, and wait for it.

    Raises:
        ShareTimeoutError: not done after `timeout_ms` milliseconds.
        ServiceUnavailableError: the scanner or the merger is away.
        UnsupportedKernelError, ClosedError, ForkedError: as they say.
    """
    report = _ShareReport()
    _check(
        _library().sp_arena_share(arena, timeout_ms, ctypes.byref(report)),
        {errno.ETIMEDOUT: errors.ShareTimeoutError},
    )
    return ShareReport(*(getattr(report, name) for name in ShareReport.__slots__))


def stats(arena: ArenaPointer) -> ArenaStats:
    """Count the arena's pages.

    Raises:
        ClosedError, ForkedError: as they say.
    """
    counts = _ArenaStats()
    _check(_library().sp_arena_stats(arena, ctypes.byref(counts)))
    return ArenaStats(*(getattr(counts, name) for name in ArenaStats.__slots__))


def seal(arena: ArenaPointer) -> None:
    """Make the arena read-only for good; see samepage.h.

    Raises:
        PinnedError, OutOfMemoryError, ClosedError, ForkedError: as samepage.errors says.
    """
    _check(_library().sp_arena_seal(arena))


def discard(arena: ArenaPointer, offset: int, size: int) -> None:
    """Give the memory of whole pages back; they read as zeros. Both numbers in bytes.

    Raises:
        InvalidArgumentError: no whole pages, or not inside the arena.
        OutOfMemoryError: no mapping is left to do it with.
        ClosedError, ForkedError: as they say.
    """
    _check(_library().sp_arena_discard(arena, offset, size))


def fetch(arena: ArenaPointer, offset: int, size: int, timeout_ms: int) -> None:
    """Bring pages back from other hosts, and wait for them. Both numbers in bytes, whole pages.

    Raises:
        LostError: no host has them any more.
        FetchTimeoutError: not all here after `timeout_ms` milliseconds.
        InvalidArgumentError, ClosedError, ForkedError: as samepage.errors says.
    """
    _check(
        _library().sp_arena_fetch(arena, offset, size, timeout_ms),
        {errno.ETIMEDOUT: errors.FetchTimeoutError},
    )


def evict(arena: ArenaPointer, offset: int, size: int, timeout_ms: int) -> EvictReport:
    """Let pages leave the host. Both numbers in bytes, whole pages.

    Raises:
        EvictTimeoutError: not done after `timeout_ms` milliseconds.
        ServiceUnavailableError, InvalidArgumentError, ClosedError, ForkedError: as samepage.errors
            says.
    """
    report = _EvictReport()
    _check(
        _library().sp_arena_evict(arena, offset, size, timeout_ms, ctypes.byref(report)),
        {errno.ETIMEDOUT: errors.EvictTimeoutError},
    )
    return EvictReport(*(getattr(report, name) for name in EvictReport.__slots__))


@dataclass(frozen=True, slots=True)
class CloneOptions:
    """What sp_arena_clone() makes; see samepage.h."""

    source_host: str
    source_arena: str
    name: str | None
    domain: str | None
    flags: int
    max_freeze_ms: int = 0


def clone_arena(
    node: NodePointer,
    options: CloneOptions,
    timeout_ms: int,
    progress: Callable[[CloneProgress], object] | None,
) -> ArenaPointer:
    """Make a copy of an arena of another host; the caller frees it.

    The library waits in a thread of its own, so that this one hears of Ctrl-C. That, and whatever
    `progress` raises, gives the clone up and is raised when nothing is left of it; a migration that
    cannot be given up any more is gone on with, and it is ignored.

    Raises:
        CloneTimeoutError: not done after `timeout_ms` milliseconds, or the freeze was too long.
        NotFoundError, NameTakenError, ServiceUnavailableError, UnsupportedKernelError and others:
            as samepage.errors says.
    """

    news: queue.SimpleQueue[CloneProgress | None] = queue.SimpleQueue()
    failures: list[errors.SamepageError] = []
    give_up = ctypes.c_int()
    arena = ctypes.c_void_p()

    def tell(told: Any, _: object) -> None:
        names = CloneProgress.__slots__
        news.put(CloneProgress(*(getattr(told.contents, name) for name in names)))

    packed = _CloneOptions(
        _text(options.source_host, "the host"),
        _text(options.source_arena, "the source arena"),
        None if options.name is None else _text(options.name, "the name"),
        None if options.domain is None else _text(options.domain, "the domain"),
        options.flags,
        options.max_freeze_ms,
        ctypes.pointer(give_up),
    )
    callback = _CloneCallback(tell)

    def work() -> None:
        try:
            result = _library().sp_arena_clone(
                node, ctypes.byref(packed), timeout_ms, callback, None, ctypes.byref(arena)
            )
            _check(result, _CLONE_ERRORS)
        except errors.SamepageError as error:
            failures.append(error)
        finally:
            news.put(None)

    thread = threading.Thread(target=work, name="samepage clone", daemon=True)
    try:
        thread.start()
        while (told := news.get()) is not None:
            if progress is not None:
                progress(told)
    except BaseException:
        give_up.value = 1
        with contextlib.suppress(RuntimeError):  # it has not begun, and gives up when it does
            thread.join()
        if not (arena.value and options.flags & CLONE_MIGRATE):
            if arena.value:
                free(arena)
            raise
    if failures:
        raise failures[0]
    return arena


def unshare(arena: ArenaPointer) -> None:
    """Make every page private.

    Raises:
        OutOfMemoryError: there is no memory for the copies.
        ClosedError, ForkedError: as they say.
    """
    _check(_library().sp_arena_unshare(arena))


def close(arena: ArenaPointer) -> None:
    """End the sharing; the memory stays until `free`. Twice is fine."""
    _check(_library().sp_arena_close(arena))


def free(arena: ArenaPointer) -> None:
    """Close, and unmap the memory."""
    _library().sp_arena_free(arena)


def fingerprint(buffer: Buffer | npt.NDArray[Any], pages: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return the fingerprints of the first `pages` pages of a buffer, as (pages, 16) bytes.

    XXH3-128 with `seed`, in canonical (big-endian) byte order. Needs numpy.

    Raises:
        InvalidArgumentError: the buffer is shorter, or the seed is no unsigned 64-bit number.
    """
    import numpy as np  # here, so that applications need it only when they fingerprint

    address = _pages_address(buffer, pages)
    if not 0 <= seed <= _SEED_MAX:
        raise errors.InvalidArgumentError(f"the seed {seed} is no unsigned 64-bit number")
    result = np.empty((pages, FINGERPRINT_SIZE), np.uint8)
    _library().sp_fingerprint(address, pages, seed, result.ctypes.data)
    return result


def digest(buffer: Buffer | npt.NDArray[Any], pages: int, key: bytes) -> npt.NDArray[np.uint8]:
    """Return the digests of the first `pages` pages of a buffer, as (pages, 32) bytes.

    BLAKE3 with a key of 32 bytes; zeros for a page that holds only zeros. Needs numpy.

    Raises:
        InvalidArgumentError: the buffer is shorter, or the key is.
    """
    import numpy as np  # as above

    address = _pages_address(buffer, pages)
    if len(key) != DIGEST_SIZE:
        raise errors.InvalidArgumentError(f"a key has {DIGEST_SIZE} bytes, not {len(key)}")
    result = np.empty((pages, DIGEST_SIZE), np.uint8)
    _library().sp_digest(address, pages, key, result.ctypes.data)
    return result


def _pages_address(buffer: Buffer | npt.NDArray[Any], pages: int) -> int:
    """Return where a buffer's bytes are, if it holds so many pages.

    Raises:
        InvalidArgumentError: it does not.
    """
    import numpy as np  # as above

    # numpy's own type says that it is a buffer from Python 3.12 on only.
    data = np.frombuffer(memoryview(buffer), np.uint8)  # type: ignore[arg-type]
    if not 0 <= pages * PAGE_SIZE <= data.size:
        raise errors.InvalidArgumentError(f"{data.size} bytes do not hold {pages} pages")
    return data.ctypes.data
