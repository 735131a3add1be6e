"""One spill file: frames of pages, each with a header that has their digests (spill.py)."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from samepage.daemon.failpoints import failpoint
from samepage.daemon.wire import DIGEST_BYTES, PAGE_SIZE
from samepage_merger.cluster.away import Bytes, Digests
from samepage_merger.runs import Int64s, join
from samepage_merger.store import punch

FRAME_PAGES_MAX = 512
SEGMENT_PAGES = 1 << 14

_HEADER = struct.Struct("<8sII16x")
_MAGIC = b"spspill1"

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Segment:
    """One file. Locations are its number times SEGMENT_PAGES, and the page within it.

    Attributes:
        size: in pages.
        live: how many of its pages are in the index.
        used_bytes: on disk.
    """

    number: int
    path: Path
    fd: int
    size: int = 0
    live: int = 0
    used_bytes: int = 0

    def measure(self) -> None:
        """Look how much of the disk it takes."""
        self.used_bytes = os.fstat(self.fd).st_blocks * 512

    def append(self, digests: Digests, data: Bytes) -> int:
        """Write and sync a frame; return the location of its first page.

        Raises:
            OSError: nobody knows what of it is on disk: cut it off, and write no more.
        """
        header = _pack_header(digests)
        _write_all(self.fd, (header, data), self.size * PAGE_SIZE)
        failpoint("spill.written")
        os.fdatasync(self.fd)
        failpoint("spill.synced")
        first = self.number * SEGMENT_PAGES + self.size + len(header) // PAGE_SIZE
        self.size += (len(header) + len(data)) // PAGE_SIZE
        self.live += len(digests)
        self.measure()
        return first

    def cut_off(self) -> None:
        """Take back what was written last."""
        try:
            os.ftruncate(self.fd, self.size * PAGE_SIZE)
            self.measure()
        except OSError as error:
            log.error("cannot cut off a spill file", path=str(self.path), why=error.strerror)

    def give_back(self, pages: Int64s) -> None:
        """Punch out pages (ascending)."""
        first, count = join(pages)
        try:
            for page, pages_of_run in zip(first.tolist(), count.tolist(), strict=True):
                punch(self.fd, page * PAGE_SIZE, pages_of_run * PAGE_SIZE)
            self.measure()
        except OSError as error:
            # The space comes back with the whole segment.
            log.info("cannot punch a spill file", path=str(self.path), why=error.strerror)

    def frames(self) -> Iterator[tuple[int, Digests]]:
        """Return the location of the first page of each frame, and their digests; ends where a
        header is none, or its frame is not there in full."""
        base = self.number * SEGMENT_PAGES
        pages = os.fstat(self.fd).st_size // PAGE_SIZE
        while (digests := _unpack_header(self.fd, self.size * PAGE_SIZE)) is not None:
            first = self.size + header_pages(len(digests))
            if first + len(digests) > pages:
                return
            yield base + first, digests
            self.size = first + len(digests)


def header_pages(pages: int) -> int:
    """Return how many pages the header of a frame of so many pages takes."""
    return -(-(_HEADER.size + pages * DIGEST_BYTES) // PAGE_SIZE)


def _pack_header(digests: Digests) -> bytes:
    packed = digests.tobytes()
    header = _HEADER.pack(_MAGIC, len(digests), zlib.crc32(packed)) + packed
    return header.ljust(header_pages(len(digests)) * PAGE_SIZE, b"\0")


def _unpack_header(fd: int, offset: int) -> Digests | None:
    start = os.pread(fd, _HEADER.size, offset)
    if len(start) < _HEADER.size:
        return None
    magic, count, checksum = _HEADER.unpack(start)
    if magic != _MAGIC or not 0 < count <= FRAME_PAGES_MAX:
        return None
    packed = os.pread(fd, count * DIGEST_BYTES, offset + _HEADER.size)
    if zlib.crc32(packed) != checksum:
        return None
    return np.frombuffer(packed, np.uint8).reshape(-1, DIGEST_BYTES)


def _write_all(fd: int, parts: tuple[Bytes, ...], offset: int) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written
