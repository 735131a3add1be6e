"""A read-only view of the store's directory, for the descriptors that agents get.

A descriptor that was opened O_RDONLY on an ordinary mount can be reopened for writing through
/proc/self/fd by whoever has the rights to the file. One that was opened through a read-only mount
cannot, whoever holds it: the mount is what refuses. So agents get descriptors from such a mount
only: a second one that the operator made (`store_readonly_dir`), or a detached clone of the
store's own mount that no path leads to.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from samepage.errors import SamepageError

_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_NOEXEC = 0x8

_libc = ctypes.CDLL(None, use_errno=True)


class StoreError(SamepageError):
    """The store cannot be used; the text says what to do."""


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class ReadOnlyView:
    """The store's directory, seen through a read-only mount.

    Raises:
        StoreError: `readonly_dir` is no read-only mount of `directory`; or it is None, and this
            process may not make one.
    """

    def __init__(self, directory: Path, readonly_dir: Path | None) -> None:
        if readonly_dir is None:
            self._fd = _clone_read_only(directory)
        else:
            self._fd = _open_read_only(directory, readonly_dir)

    def open(self, name: str) -> int:
        """Return a new open file description of the file, for reading only."""
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)

    def close(self) -> None:
        """Let go of the mount; descriptors that were opened through it stay."""
        os.close(self._fd)


def _clone_read_only(directory: Path) -> int:
    try:
        fd = _syscall(
            _SYS_OPEN_TREE,
            ctypes.c_int(_AT_FDCWD),
            ctypes.c_char_p(os.fsencode(directory)),
            ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
        )
    except OSError as error:
        raise _cannot_clone(directory, error) from error
    locked_down = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
    attributes = _MountAttr(attr_set=locked_down)
    try:
        _syscall(
            _SYS_MOUNT_SETATTR,
            ctypes.c_int(fd),
            ctypes.c_char_p(b""),
            ctypes.c_uint(_AT_EMPTY_PATH),
            ctypes.byref(attributes),
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        )
    except OSError as error:
        os.close(fd)
        raise _cannot_clone(directory, error) from error
    return fd


def _cannot_clone(directory: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot make a read-only view of {directory} ({error.strerror}): run the merger with"
        " CAP_SYS_ADMIN on Linux 5.12 or later, or mount the directory a second time, read-only"
        " (mount --bind, then mount -o remount,bind,ro; in Kubernetes a second volumeMount with"
        " readOnly: true), and set store_readonly_dir to it"
    )


def _open_read_only(directory: Path, readonly_dir: Path) -> int:
    try:
        fd = os.open(readonly_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(
            f"cannot open store_readonly_dir {readonly_dir} ({error.strerror}): it must be a"
            f" read-only mount of {directory}"
        ) from error
    writable = not os.fstatvfs(fd).f_flag & os.ST_RDONLY
    if writable or not os.path.samestat(os.fstat(fd), os.stat(directory)):
        os.close(fd)
        wrong = "can be written" if writable else "is another directory"
        raise StoreError(
            f"store_readonly_dir {readonly_dir} {wrong}: it must be a read-only mount of"
            f" {directory} (mount --bind, then mount -o remount,bind,ro)"
        )
    return fd


def _syscall(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
