"""What the demo's workers load: real files, the same in every worker."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from samepage.errors import InvalidArgumentError
from samepage.reports import PAGE_SIZE

_PLACES = ("/usr/lib", "/usr/local/lib", "/usr/share", sys.prefix, sys.base_prefix)
_FILE_BYTES_MIN = 256 * 1024
# No more than this part of all that is loaded comes from one file, when there are enough.
_FILE_PART = 8


@dataclass(frozen=True)
class Input:
    """A file, or its beginning, and where the workers put it.

    Attributes:
        path: which file.
        offset: where it begins in the arena, in bytes; the start of a page.
        size: how much of it is loaded, in bytes.
    """

    path: str
    offset: int
    size: int

    def digest(self, change: bytes = b"", changed_pages: int = 0) -> str:
        """Return the SHA-256 of the loaded part, with `change` at the start of its first pages."""
        content = bytearray(Path(self.path).read_bytes()[: self.size])
        for page in range(changed_pages):
            start = page * PAGE_SIZE
            content[start : start + len(change)] = change[: max(0, len(content) - start)]
        return hashlib.sha256(content).hexdigest()


def choose(own: Iterable[Path], limit: int) -> list[Input]:
    """Return what to load: the given files and directories, else the largest ones found.

    Args:
        own: files and directories; all of them are loaded.
        limit: how much to find when none are given, in bytes.

    Raises:
        InvalidArgumentError: a file cannot be read, or there is nothing to load.
    """
    paths = list(own)
    found = list(_given(paths)) if paths else _largest(limit)
    if not found:
        raise InvalidArgumentError("there is nothing to load: name files that hold some bytes")
    inputs, offset = [], 0
    for path, size in found:
        inputs.append(Input(path, offset, size))
        offset += -(-size // PAGE_SIZE) * PAGE_SIZE
    return inputs


def arena_bytes(inputs: list[Input]) -> int:
    """Return what the files take in an arena, in bytes: whole pages."""
    last = inputs[-1]
    return last.offset + -(-last.size // PAGE_SIZE) * PAGE_SIZE


def _given(paths: list[Path]) -> Iterator[tuple[str, int]]:
    for path in paths:
        if path.is_dir():
            files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        elif path.is_file():
            files = [path]
        else:
            raise InvalidArgumentError(f"there is no file {path}")
        for file in files:
            if not os.access(file, os.R_OK):
                raise InvalidArgumentError(f"{file} cannot be read by this user")
            size = file.stat().st_size
            if size:
                yield str(file.absolute()), size


def _largest(limit: int) -> list[tuple[str, int]]:
    """The largest files of the system's libraries and data, `limit` bytes in all."""
    sizes: dict[tuple[int, int], tuple[int, str]] = {}
    for place in _PLACES:
        for path, info in _regular_files(place):
            sizes[info.st_dev, info.st_ino] = (info.st_size, path)
    by_size = sorted(sizes.values(), reverse=True)
    handy = [file for file in by_size if file[0] * _FILE_PART <= limit]
    chosen, left = [], limit
    for size, path in [*handy, *reversed(by_size[: len(by_size) - len(handy)])]:
        if left <= 0:
            break
        chosen.append((path, min(size, left)))
        left -= chosen[-1][1]
    return chosen


def _regular_files(place: str) -> Iterator[tuple[str, os.stat_result]]:
    for directory, _, names in os.walk(place):
        for name in names:
            path = os.path.join(directory, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue  # gone since it was listed
            if (
                stat.S_ISREG(info.st_mode)
                and info.st_size >= _FILE_BYTES_MIN
                and os.access(path, os.R_OK)
            ):
                yield path, info
